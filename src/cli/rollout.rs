//! `tidegate rollout`: starts, watches and steers how one version of a model takes over from another.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::{
    ask::{Answer, AskArgs, Ops, Refused},
    print::{say, say_json},
};
use crate::{
    api::admin::{
        documents::{Refusal, RolloutStatus},
        requests::{StartRequest, Why},
    },
    id::{ModelName, Version},
    rollout::name_of,
};

mod by_hand;
mod progress;
mod watch;

#[derive(Args)]
pub struct RolloutArgs {
    #[command(flatten)]
    ask: AskArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Have a version take over step by step; what is not said is as the model's settings have it.
    Start(StartArgs),
    /// Show where a model's rollout is, what the judge sees, and what happened.
    Status {
        #[command(flatten)]
        on: On,
        /// Show the progress until it is over; the exit code is 0 when it was done and 1 when it was given up
        #[arg(long)]
        watch: bool,
    },
    /// Stay at the present step.
    Pause(Tell),
    /// Go on from where it was paused: with the same step, or with what comes next if that one was passed.
    Resume(Tell),
    /// Go on to the next step at once.
    Advance(Tell),
    /// Give the candidate all requests at once.
    Promote(Tell),
    /// Give up the candidate: the stable version has all requests again.
    Abort(Tell),
    /// Take back the candidate, also after it was promoted.
    Rollback(Tell),
    /// Give the canary a percentage of the requests by hand.
    Set {
        #[command(flatten)]
        tell: Tell,
        /// Percent of the requests
        percent: f64,
        /// The canary's version [default: the present one]
        #[arg(long, value_name = "VERSION", value_parser = Version::parse)]
        to: Option<Version>,
    },
    /// List what is other than the repository has it: routes set by hand, versions that were given up.
    Overrides {
        #[command(subcommand)]
        action: Option<OverridesAction>,
    },
}

#[derive(Subcommand)]
enum OverridesAction {
    /// Forget it, of one model or of all.
    Clear {
        #[arg(value_parser = ModelName::parse)]
        model: Option<ModelName>,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
}

#[derive(Args)]
struct On {
    /// Name of the model
    #[arg(value_parser = ModelName::parse)]
    model: ModelName,
}

#[derive(Args)]
struct Tell {
    #[command(flatten)]
    on: On,
    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Args)]
struct StartArgs {
    #[command(flatten)]
    tell: Tell,
    /// The version that shall take over; any in the repository
    #[arg(long, value_name = "VERSION", value_parser = Version::parse)]
    to: Version,
    /// Percents of the requests, step by step; the last is 100
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',')]
    steps: Option<Vec<f64>>,
    /// How long each step takes at least, 10m for instance
    #[arg(long, value_name = "TIME")]
    every: Option<String>,
    /// Percent of the requests that the candidate gets copies of, before it gets any
    #[arg(long, value_name = "PERCENT")]
    shadow: Option<f64>,
    /// What keeps a client's version: header:NAME, param:NAME or input:NAME
    #[arg(long, value_name = "KEY")]
    sticky: Option<String>,
    /// Wait for an operator (`resume`) at the end of each step
    #[arg(long)]
    manual: bool,
    /// Answers of the candidate that each step needs
    #[arg(long, value_name = "N")]
    min_samples: Option<u64>,
    /// Show the progress until it is over; the exit code is 0 when it was done and 1 when it was given up
    #[arg(long)]
    watch: bool,
}

/// Runs the command.
///
/// # Errors
/// What the server or the line to it has against it, and what to do next.
pub fn run(args: &RolloutArgs) -> anyhow::Result<ExitCode> {
    let ops = Ops::with_token(&args.ask)?;
    let json = args.ask.json;
    match &args.action {
        Action::Start(start) => self::start(&ops, start, json),
        Action::Status { on, watch: true } => watch::watch(&ops, &on.model, json),
        Action::Status { on, watch: false } => {
            let answer = ops.get(&path(&on.model)).map_err(|error| advised(error, &on.model))?;
            show(&answer, json, true)
        }
        Action::Pause(tell) => self::tell(&ops, "pause", tell, json),
        Action::Resume(tell) => self::tell(&ops, "resume", tell, json),
        Action::Advance(tell) => self::tell(&ops, "advance", tell, json),
        Action::Promote(tell) => self::tell(&ops, "promote", tell, json),
        Action::Abort(tell) => self::tell(&ops, "abort", tell, json),
        Action::Rollback(tell) => self::tell(&ops, "rollback", tell, json),
        Action::Set { tell, percent, to } => by_hand::set(&ops, tell, *percent, to.as_ref(), json),
        Action::Overrides { action: None } => by_hand::overrides(&ops, json),
        Action::Overrides { action: Some(OverridesAction::Clear { model, reason }) } => {
            by_hand::clear(&ops, model.as_ref(), reason.clone(), json)
        }
    }
}

fn path(model: &ModelName) -> String {
    format!("/admin/v1/models/{model}/rollout")
}

fn start(ops: &Ops, args: &StartArgs, json: bool) -> anyhow::Result<ExitCode> {
    let model = &args.tell.on.model;
    let given = [
        ("steps", args.steps.as_ref().map(|steps| json!(steps))),
        ("every", args.every.as_ref().map(|every| json!(every))),
        ("shadow", args.shadow.map(Value::from)),
        ("sticky", args.sticky.as_ref().map(|sticky| json!(sticky))),
        ("manual", args.manual.then_some(Value::Bool(true))),
        ("min_samples", args.min_samples.map(Value::from)),
    ];
    let settings: Map<String, Value> =
        given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
    let request = StartRequest { to: args.to.to_string(), why: why(args.tell.reason.clone()), settings };
    let answer = ops.change(Method::POST, &path(model), None, &request).map_err(|error| advised(error, model))?;
    if args.watch { watch::watch(ops, model, json) } else { show(&answer, json, false) }
}

fn tell(ops: &Ops, command: &str, args: &Tell, json: bool) -> anyhow::Result<ExitCode> {
    let model = &args.on.model;
    let path = format!("{}/{command}", path(model));
    let answer = ops.change(Method::POST, &path, None, &why(args.reason.clone()));
    show(&answer.map_err(|error| advised(error, model))?, json, false)
}

/// Who asks: whoever is logged in.
pub(super) fn why(reason: Option<String>) -> Why {
    let author = std::env::var("USER").ok().filter(|user| !user.is_empty());
    Why { author, reason }
}

fn show(answer: &Answer, json: bool, history: bool) -> anyhow::Result<ExitCode> {
    if json {
        say_json(&answer.read::<Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let status: RolloutStatus = answer.read()?;
    progress::lines(&status).iter().try_for_each(|line| say(format_args!("{line}")))?;
    if history {
        status.history.iter().try_for_each(|transition| say(format_args!("  {}", progress::change(transition))))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The server's own sentence, and what to do next.
pub(super) fn advised(error: anyhow::Error, model: &ModelName) -> anyhow::Error {
    let Some(Refused { status, refusal }) = error.downcast_ref::<Refused>() else { return error };
    let advice = match *status {
        StatusCode::UNAUTHORIZED => "give the server's token with --token or TIDEGATE_TOKEN".to_owned(),
        StatusCode::NOT_FOUND => "`tidegate models` lists what there is".to_owned(),
        StatusCode::CONFLICT => conflict(refusal, model),
        StatusCode::SERVICE_UNAVAILABLE => "nothing was changed; see the server's log, and try again".to_owned(),
        _ => return error,
    };
    anyhow::anyhow!("{error}\n  {advice}")
}

/// What shows how a model stands that cannot be changed as it stands.
fn conflict(refusal: &Refusal, model: &ModelName) -> String {
    let state = refusal.state.as_ref();
    let phase = state.and_then(|state| state.rollout.as_ref()).map(|rollout| rollout.phase);
    if state.is_some_and(|state| state.route.is_some()) && phase.is_none_or(progress::is_over) {
        return "`tidegate rollout overrides` lists what is set by hand".to_owned();
    }
    let stands = phase.map(|phase| format!("its rollout is {}; ", name_of(phase))).unwrap_or_default();
    format!("{stands}`tidegate rollout status {model}` shows how things stand")
}
