//! What is logged, and how an operator changes that while the server runs.
//!
//! `log.level` is the base. A setting that differs from what the base says overrides it; put back, the base decides
//! again.

use std::sync::Arc;

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::{Level, Metadata, level_filters::LevelFilter, span, subscriber::Interest};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::Targets,
    fmt,
    layer::{Context, Filter, SubscriberExt},
    reload,
    util::SubscriberInitExt,
};

use crate::error::Error;

/// Where our own lines come from.
const TARGET: &str = env!("CARGO_PKG_NAME");

/// What is written to standard error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// "text" or "json".
    pub format: LogFormat,
    /// What to log, as a level or a filter such as "info,tidegate=debug"; debug logs every request.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".to_owned() }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// What an operator may change while the server runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub error: bool,
    pub warning: bool,
    pub info: bool,
    /// From 1 on debug lines are shown, from 2 on trace lines too.
    pub verbose_level: u32,
    /// Whether the operator asked for ISO 8601 times by name. Our lines have no others.
    pub iso8601: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { error: true, warning: true, info: true, verbose_level: 0, iso8601: false }
    }
}

impl Settings {
    /// What a filter shows of our own lines outside of spans; of one that looks at values, the most that it may show.
    fn of_filter(text: &str, filter: &EnvFilter) -> Self {
        let targets: Option<Targets> = text.parse().ok();
        let shows = |level: Level| match &targets {
            Some(targets) => targets.would_enable(TARGET, &level),
            None => filter.max_level_hint().is_none_or(|most| level <= most),
        };
        Self {
            error: shows(Level::ERROR),
            warning: shows(Level::WARN),
            info: shows(Level::INFO),
            verbose_level: u32::from(shows(Level::DEBUG)) + u32::from(shows(Level::TRACE)),
            iso8601: false,
        }
    }

    fn shows(&self, level: Level) -> bool {
        match level {
            Level::ERROR => self.error,
            Level::WARN => self.warning,
            Level::INFO => self.info,
            Level::DEBUG => self.verbose_level >= 1,
            Level::TRACE => self.verbose_level >= 2,
        }
    }
}

/// The running log; cheap to clone.
///
/// The default one belongs to a process whose lines others write: its settings are kept and change nothing else.
#[derive(Clone, Default)]
pub struct Logging {
    settings: Arc<Mutex<Settings>>,
    gate: Option<reload::Handle<Gate, Registry>>,
}

impl Logging {
    /// Starts to log to standard error.
    ///
    /// # Errors
    /// `InvalidArgument` naming `log.level` when it is no filter; `Internal` when the process logs already.
    pub fn start(config: &LogConfig) -> Result<Self, Error> {
        let level = &config.level;
        let base = EnvFilter::builder()
            .parse(level)
            .map_err(|error| Error::invalid(format!("log.level '{level}' is no filter: {error}")))?;
        let start = Settings::of_filter(level, &base);
        let (gate, handle) = reload::Layer::new(Gate { base, start: start.clone(), now: start.clone() });
        let lines = fmt::layer().with_writer(std::io::stderr);
        let lines = match config.format {
            LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry()
            .with(lines.with_filter(gate))
            .try_init()
            .map_err(|error| Error::internal(error.to_string()))?;
        Ok(Self { settings: Arc::new(Mutex::new(start)), gate: Some(handle) })
    }

    pub fn settings(&self) -> Settings {
        self.settings.lock().clone()
    }

    /// Puts in force what `change` makes of the settings: all of it or, when it fails, nothing.
    ///
    /// # Errors
    /// What `change` says; `Internal` when the log has gone.
    pub fn change(&self, change: impl FnOnce(Settings) -> Result<Settings, Error>) -> Result<Settings, Error> {
        let mut settings = self.settings.lock();
        let new = change(settings.clone())?;
        if let Some(gate) = &self.gate {
            gate.modify(|gate| gate.now = new.clone())
                .map_err(|error| Error::internal(format!("the log cannot be changed: {error}")))?;
        }
        *settings = new.clone();
        Ok(new)
    }
}

/// Lets a line through or not.
struct Gate {
    base: EnvFilter,
    /// What the base shows.
    start: Settings,
    now: Settings,
}

impl Gate {
    /// What the settings say of a line; `None` leaves it to the base.
    fn decides(&self, line: &Metadata<'_>) -> Option<bool> {
        let level = *line.level();
        let shown = self.now.shows(level);
        if !line.is_event() || shown == self.start.shows(level) {
            return None;
        }
        // What is switched off is off for all; what is switched on is not meant for the libraries.
        let ours = line.target() == TARGET || line.target().starts_with(concat!(env!("CARGO_PKG_NAME"), "::"));
        if shown && !ours { None } else { Some(shown) }
    }
}

impl<S> Filter<S> for Gate {
    fn enabled(&self, line: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        self.decides(line).unwrap_or_else(|| Filter::enabled(&self.base, line, context))
    }

    fn callsite_enabled(&self, line: &'static Metadata<'static>) -> Interest {
        let base = <EnvFilter as Filter<S>>::callsite_enabled(&self.base, line);
        match self.decides(line) {
            Some(true) => Interest::always(),
            Some(false) => Interest::never(),
            None => base,
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let levels = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        let most = levels.into_iter().find(|level| self.now.shows(*level)).map_or(LevelFilter::OFF, Into::into);
        self.base.max_level_hint().map(|base| base.max(most))
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        self.base.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        self.base.on_record(id, values, context);
    }

    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        self.base.on_enter(id, context);
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        self.base.on_exit(id, context);
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        self.base.on_close(id, context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gate over `base`, under a subscriber that writes lines into the buffer.
    fn gated(base: &str) -> (Logging, Arc<Mutex<Vec<u8>>>, impl tracing::Subscriber + Send + Sync) {
        let filter = EnvFilter::builder().parse(base).unwrap();
        let start = Settings::of_filter(base, &filter);
        let (gate, handle) = reload::Layer::new(Gate { base: filter, start: start.clone(), now: start.clone() });
        let buffer = Arc::new(Mutex::new(Vec::new()));
        let writer = buffer.clone();
        let lines = fmt::layer().with_ansi(false).without_time().with_writer(move || Lines(writer.clone()));
        let subscriber = tracing_subscriber::registry().with(lines.with_filter(gate));
        (Logging { settings: Arc::new(Mutex::new(start)), gate: Some(handle) }, buffer, subscriber)
    }

    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// One line of ours and one of a library at every level; those that were written.
    fn written(buffer: &Mutex<Vec<u8>>) -> String {
        buffer.lock().clear();
        tracing::error!("e");
        tracing::warn!("w");
        tracing::info!("i");
        tracing::debug!("d");
        tracing::trace!("t");
        tracing::error!(target: "library", "E");
        tracing::warn!(target: "library", "W");
        tracing::info!(target: "library", "I");
        tracing::debug!(target: "library", "D");
        tracing::trace!(target: "library", "T");
        let text = String::from_utf8(buffer.lock().clone()).unwrap();
        text.lines().map(|line| line.rsplit(' ').next().unwrap()).collect()
    }

    #[test]
    fn settings_override_the_base_and_give_way_to_it_again() {
        let (logging, buffer, subscriber) = gated("info");
        tracing::subscriber::with_default(subscriber, || {
            let set = |settings: Settings| logging.change(|_| Ok(settings)).map(|_| written(&buffer)).unwrap();
            let start = logging.settings();
            assert_eq!(start, Settings::default());
            assert_eq!(written(&buffer), "ewiEWI");
            assert_eq!(set(Settings { verbose_level: 1, ..start.clone() }), "ewidEWI");
            assert_eq!(set(Settings { verbose_level: 9, ..start.clone() }), "ewidtEWI");
            assert_eq!(set(Settings { info: false, ..start.clone() }), "ewEW");
            assert_eq!(set(Settings { warning: false, ..start.clone() }), "eiEI");
            assert_eq!(set(start), "ewiEWI");
            let refused = logging.change(|_| Err(Error::invalid("no")));
            assert!(refused.is_err() && logging.settings() == Settings::default());
        });
    }

    #[test]
    fn what_the_base_shows_is_what_the_settings_say() {
        let (logging, buffer, subscriber) = gated("warn,tidegate=debug");
        tracing::subscriber::with_default(subscriber, || {
            assert_eq!(logging.settings(), Settings { verbose_level: 1, ..Settings::default() });
            assert_eq!(written(&buffer), "ewidEW");
            logging.change(|settings| Ok(Settings { verbose_level: 0, ..settings })).unwrap();
            assert_eq!(written(&buffer), "ewiEW");
        });
        let quiet = Settings { info: false, ..Settings::default() };
        assert_eq!(gated("warn").0.settings(), quiet.clone());
        let outside = Settings { warning: false, ..quiet };
        assert_eq!(gated("error,[request]=warn").0.settings(), outside, "as it is outside of spans");
    }
}
