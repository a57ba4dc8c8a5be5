//! Shares that are set by hand, and what else is other than the repository has it.

use std::process::ExitCode;

use anyhow::{Context, bail};
use http::Method;

use super::{
    super::{
        ask::Ops,
        print::{say, say_json},
    },
    Tell, advised, why,
};
use crate::{
    api::admin::{
        documents::{ArmStatus, Cleared, ModelStatus, OverrideStatus, Share},
        requests::{RouteRequest, Why},
    },
    id::{ModelName, Version},
    model::State,
};

/// What the canary's arm is called.
const CANARY: &str = "canary";

pub(super) fn set(ops: &Ops, args: &Tell, percent: f64, to: Option<&Version>, json: bool) -> anyhow::Result<ExitCode> {
    let model = &args.on.model;
    let place = format!("/admin/v1/models/{model}");
    let status: ModelStatus = ops.get(&place).map_err(|error| advised(error, model))?.read()?;
    let request = RouteRequest { why: why(args.reason.clone()), ..with_canary(&status, percent, to)? };
    // Of the state that the request was made from.
    let changed = ops.change(Method::PUT, &format!("{place}/route"), Some(status.epoch), &request);
    let answer = changed.map_err(|error| advised(error, model))?;
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let status: ModelStatus = answer.read()?;
    let route = status.route.context("the server did not say how the requests are divided now")?;
    for ArmStatus { name, version, percent } in &route.arms {
        say(format_args!("{model}: {percent} % to version {version} ({name})"))?;
    }
    say(format_args!("{model}: the rest to version {} (stable)", route.stable))?;
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

pub(super) fn overrides(ops: &Ops, json: bool) -> anyhow::Result<ExitCode> {
    let answer = ops.get("/admin/v1/overrides")?;
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let overridden: Vec<OverrideStatus> = answer.read()?;
    if overridden.is_empty() {
        say(format_args!("everything is as the repository has it"))?;
    }
    for OverrideStatus { model, route, passed_over, rollout, .. } in overridden {
        if let Some(by_hand) = route {
            let share = |arm: &ArmStatus| format!("{} % {} ({})", arm.percent, arm.version, arm.name);
            let mut shares: Vec<String> = by_hand.route.arms.iter().map(share).collect();
            let copies = by_hand.route.shadow.iter();
            shares.extend(copies.map(|shadow| format!("copies of {} % to {}", shadow.percent, shadow.version)));
            let (stable, shares) = (&by_hand.route.stable, shares.join(", "));
            let reason = in_words(&by_hand.reason);
            say(format_args!("{model}: route by hand: {stable} (stable), {shares}; by {}{reason}", by_hand.author))?;
        }
        for passed in passed_over {
            say(format_args!("{model}: version {} is passed over: {}", passed.version, passed.reason))?;
        }
        if let Some(rollout) = rollout {
            say(format_args!("{model}: rollout {} to version {} runs", rollout.id, rollout.candidate))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

pub(super) fn clear(
    ops: &Ops,
    model: Option<&ModelName>,
    reason: Option<String>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let path = "/admin/v1/overrides";
    let path = model.map_or(path.to_owned(), |model| format!("{path}?model={model}"));
    let cleared = ops.change(Method::DELETE, &path, None, &why(reason));
    let answer = match model {
        Some(model) => cleared.map_err(|error| advised(error, model))?,
        None => cleared?,
    };
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Cleared { cleared } = answer.read()?;
    let shown = if cleared.is_empty() { "nothing: there were no overrides".to_owned() } else { cleared.join(", ") };
    say(format_args!("cleared {shown}"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

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
            "arms": [
                { "name": "canary", "version": "2", "percent": 5.0 },
                { "name": "b", "version": "4", "percent": 1.0 },
            ],
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
