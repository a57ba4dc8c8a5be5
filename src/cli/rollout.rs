//! `tidegate rollout`: starts, watches and steers how one version of a model takes over from another.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::{
    ask::{Answer, AskArgs, Ops, Refused},
    say,
};
use crate::{
    api::admin::{
        documents::{ArmStatus, Cleared, ModelStatus, OverrideStatus, RolloutStatus, Share},
        requests::{RouteRequest, StartRequest, Why},
    },
    id::{ModelName, Version},
    model::State,
};

mod progress;
mod watch;

/// What the canary's arm is called.
const CANARY: &str = "canary";

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
    /// Go on from where it was paused.
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
    /// Wait for an operator (`advance`) at the end of each step
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
        Action::Set { tell, percent, to } => set(&ops, tell, *percent, to.as_ref(), json),
        Action::Overrides { action: None } => overrides(&ops, json),
        Action::Overrides { action: Some(OverridesAction::Clear { model, reason }) } => {
            clear(&ops, model.as_ref(), reason.clone(), json)
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
fn why(reason: Option<String>) -> Why {
    let author = std::env::var("USER").ok().filter(|user| !user.is_empty());
    Why { author, reason }
}

fn show(answer: &Answer, json: bool, history: bool) -> anyhow::Result<ExitCode> {
    if json {
        say(format_args!("{}", answer.pretty()?));
        return Ok(ExitCode::SUCCESS);
    }
    let status: RolloutStatus = answer.read()?;
    progress::lines(&status).iter().for_each(|line| say(format_args!("{line}")));
    if history {
        status.history.iter().for_each(|transition| say(format_args!("  {}", progress::change(transition))));
    }
    Ok(ExitCode::SUCCESS)
}

fn set(ops: &Ops, args: &Tell, percent: f64, to: Option<&Version>, json: bool) -> anyhow::Result<ExitCode> {
    let model = &args.on.model;
    let place = format!("/admin/v1/models/{model}");
    let status: ModelStatus = ops.get(&place).map_err(|error| advised(error, model))?.read()?;
    let request = RouteRequest { why: why(args.reason.clone()), ..with_canary(&status, percent, to)? };
    // Of the state that the request was made from.
    let changed = ops.change(Method::PUT, &format!("{place}/route"), Some(status.epoch), &request);
    let answer = changed.map_err(|error| advised(error, model))?;
    if json {
        say(format_args!("{}", answer.pretty()?));
        return Ok(ExitCode::SUCCESS);
    }
    let status: ModelStatus = answer.read()?;
    let route = status.route.context("the server did not say how the requests are divided now")?;
    for ArmStatus { name, version, percent } in &route.arms {
        say(format_args!("{model}: {percent} % to version {version} ({name})"));
    }
    say(format_args!("{model}: the rest to version {} (stable)", route.stable));
    Ok(ExitCode::SUCCESS)
}

/// The present route by hand with another canary, or with another share of it.
fn with_canary(status: &ModelStatus, percent: f64, to: Option<&Version>) -> anyhow::Result<RouteRequest> {
    let route = status.route.as_ref();
    let arms = route.map(|route| route.arms.as_slice()).unwrap_or_default();
    let present = arms.iter().find(|arm| arm.name == CANARY).map(|arm| arm.version.clone());
    let Some(version) = to.map(ToString::to_string).or(present) else {
        let model = &status.name;
        let stable = route.map(|route| &route.stable).or(status.default_version.as_ref());
        let loaded = status.versions.iter().filter(|version| version.state == State::Ready.as_str());
        let others: Vec<&str> = loaded
            .map(|version| &version.version)
            .filter(|version| Some(*version) != stable)
            .map(String::as_str)
            .collect();
        let loaded = if others.is_empty() {
            "no other version is loaded, and any in the repository will do".to_owned()
        } else {
            format!("loaded besides the stable one: {}", others.join(", "))
        };
        bail!("model '{model}' has no canary; name its version with --to VERSION ({loaded})");
    };
    Ok(RouteRequest {
        stable: route.map(|route| route.stable.clone()),
        canary: Some(Share { version, percent }),
        arms: arms.iter().filter(|arm| arm.name != CANARY).cloned().collect(),
        shadow: route.and_then(|route| route.shadow.clone()),
        sticky: route.and_then(|route| route.sticky.clone()),
        why: Why::default(),
    })
}

fn overrides(ops: &Ops, json: bool) -> anyhow::Result<ExitCode> {
    let answer = ops.get("/admin/v1/overrides")?;
    if json {
        say(format_args!("{}", answer.pretty()?));
        return Ok(ExitCode::SUCCESS);
    }
    let overridden: Vec<OverrideStatus> = answer.read()?;
    if overridden.is_empty() {
        say(format_args!("everything is as the repository has it"));
    }
    for OverrideStatus { model, route, passed_over, rollout, .. } in overridden {
        if let Some(by_hand) = route {
            let share = |arm: &ArmStatus| format!("{} % {} ({})", arm.percent, arm.version, arm.name);
            let mut shares: Vec<String> = by_hand.route.arms.iter().map(share).collect();
            let copies = by_hand.route.shadow.iter();
            shares.extend(copies.map(|shadow| format!("copies of {} % to {}", shadow.percent, shadow.version)));
            let (stable, shares) = (&by_hand.route.stable, shares.join(", "));
            let reason = in_words(&by_hand.reason);
            say(format_args!("{model}: route by hand: {stable} (stable), {shares}; by {}{reason}", by_hand.author));
        }
        for passed in passed_over {
            say(format_args!("{model}: version {} is passed over: {}", passed.version, passed.reason));
        }
        if let Some(rollout) = rollout {
            say(format_args!("{model}: rollout {} to version {} runs", rollout.id, rollout.candidate));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn clear(ops: &Ops, model: Option<&ModelName>, reason: Option<String>, json: bool) -> anyhow::Result<ExitCode> {
    let path = "/admin/v1/overrides";
    let path = model.map_or(path.to_owned(), |model| format!("{path}?model={model}"));
    let cleared = ops.change(Method::DELETE, &path, None, &why(reason));
    let answer = match model {
        Some(model) => cleared.map_err(|error| advised(error, model))?,
        None => cleared?,
    };
    if json {
        say(format_args!("{}", answer.pretty()?));
        return Ok(ExitCode::SUCCESS);
    }
    let Cleared { cleared } = answer.read()?;
    let shown = if cleared.is_empty() { "nothing: there were no overrides".to_owned() } else { cleared.join(", ") };
    say(format_args!("cleared {shown}"));
    Ok(ExitCode::SUCCESS)
}

/// The server's own sentence, and what to do next where it does not say so.
fn advised(error: anyhow::Error, model: &ModelName) -> anyhow::Error {
    let Some(refused) = error.downcast_ref::<Refused>() else { return error };
    let said = &refused.refusal.error;
    let advice = match refused.status {
        _ if said.contains("tidegate ") || said.contains("rollout overrides clear") => return error,
        StatusCode::UNAUTHORIZED => "give the server's token with --token or TIDEGATE_TOKEN".to_owned(),
        StatusCode::NOT_FOUND if said.contains("no rollout") => {
            format!("start one with `tidegate rollout start {model} --to VERSION`")
        }
        StatusCode::NOT_FOUND => "`tidegate models` lists what there is".to_owned(),
        StatusCode::CONFLICT => {
            let phase = refused.refusal.state.as_ref().and_then(|state| state.rollout.as_ref());
            let phase = phase.map(|rollout| crate::rollout::name_of(rollout.phase));
            let stands = phase.map(|phase| format!("its rollout is {phase}; ")).unwrap_or_default();
            format!("{stands}`tidegate rollout status {model}` shows how things stand")
        }
        StatusCode::SERVICE_UNAVAILABLE => "nothing was changed; see the server's log, and try again".to_owned(),
        _ => return error,
    };
    anyhow::anyhow!("{said}\n  {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(route: &Value) -> ModelStatus {
        let version = |version: &str, state: &str| json!({ "version": version, "state": state, "reason": "" });
        serde_json::from_value(json!({
            "name": "m", "default_version": "1", "problem": null, "rollout": null, "epoch": 3, "route": route,
            "versions": [version("1", "ready"), version("2", "ready"), version("3", "failed"), version("4", "ready")],
        }))
        .unwrap()
    }

    #[test]
    fn the_canary_stays_who_it_is_unless_another_is_named() {
        let route = json!({
            "id": "m/r1", "stable": "1", "sticky": "header:x-user", "shadow": { "version": "4", "percent": 10.0 },
            "arms": [{ "name": "canary", "version": "2", "percent": 5.0 }, { "name": "b", "version": "4", "percent": 1.0 }],
        });
        let changed = with_canary(&status(&route), 25.0, None).unwrap();
        assert_eq!(changed.canary, Some(Share { version: "2".to_owned(), percent: 25.0 }));
        assert_eq!((changed.arms.len(), changed.arms[0].name.as_str()), (1, "b"));
        assert_eq!((changed.sticky.as_deref(), changed.shadow.unwrap().percent), (Some("header:x-user"), 10.0));
        let to = Version::parse("4").unwrap();
        let changed = with_canary(&status(&Value::Null), 0.5, Some(&to)).unwrap();
        assert_eq!((changed.canary.unwrap().version.as_str(), changed.stable), ("4", None));
    }

    #[test]
    fn without_a_canary_one_is_asked_for_by_name() {
        let error = with_canary(&status(&Value::Null), 5.0, None).unwrap_err().to_string();
        assert_eq!(
            error,
            "model 'm' has no canary; name its version with --to VERSION (loaded besides the stable one: 2, 4)"
        );
    }
}
