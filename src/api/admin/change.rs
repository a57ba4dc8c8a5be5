//! Changes of who gets which version: started, told and divided by hand.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::HeaderMap;

use super::{
    asked::{Fields, asked},
    documents::{ArmStatus, Refusal, Share},
    shown_rollout, status_of, told_model, told_rollout,
};
use crate::{
    api::{
        App,
        repository::until_closing,
        rest::{Named, RestError, read_body},
        status,
    },
    control::{
        command::{Asked, Change},
        standing::{Split, Standing},
    },
    error::{Code, Error, shorten},
    id::{Alias, ModelName, Version},
    rollout::{
        Command,
        plan::Settings,
        route::{Arm, Shadow, Variant, Weight},
    },
};

/// What a rollout can be told.
pub(super) const COMMANDS: [&str; 6] = ["pause", "resume", "advance", "promote", "abort", "rollback"];

/// Why a change was refused.
pub(super) enum Refused {
    Plain(RestError),
    /// It cannot be done as things stand now, which are told along.
    Conflict(Box<Refusal>),
}

impl<E: Into<RestError>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self::Plain(error.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self::Plain(error) => error.into_response(),
            Self::Conflict(refusal) => (status::http(Code::Conflict), Json(refusal)).into_response(),
        }
    }
}

pub(super) type Answer = Result<Response, Refused>;

pub(super) async fn start(State(app): State<Arc<App>>, Named { model, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    let mut fields = Fields::parse(&body)?;
    let asked = asked(&headers, &mut fields)?;
    let to = fields.require("to")?;
    let settings = fields.rest_as::<Settings>()?;
    change(&app, &model, asked, Change::Start { to, settings }).await?;
    Ok(told_rollout(&app.engine.catalog().load(), &model)?)
}

pub(super) async fn tell(State(app): State<Arc<App>>, Named { model, command, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    let command = self::command(&command)?;
    change(&app, &model, why(&headers, &body)?, Change::Tell(command)).await?;
    Ok(told_or_remembered(&app, &model).await?)
}

/// How a rollout stands after it was told something, also that of a model which has left the repository.
async fn told_or_remembered(app: &App, model: &str) -> Result<Response, Error> {
    let told = told_rollout(&app.engine.catalog().load(), model);
    if !matches!(&told, Err(error) if error.code == Code::NotFound) {
        return told;
    }
    let mut remembered = app.commands.overrides().await?;
    remembered.retain(|(name, _)| name.as_str() == model);
    match remembered.first() {
        Some((name, Standing { epoch, rollout: Some(rollout), .. })) => Ok(shown_rollout(name, rollout, *epoch, None)),
        _ => told,
    }
}

pub(super) async fn divide(State(app): State<Arc<App>>, Named { model, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    let mut fields = Fields::parse(&body)?;
    let asked = asked(&headers, &mut fields)?;
    let split = split(fields)?;
    change(&app, &model, asked, Change::Route(Some(split))).await?;
    Ok(told_model(&app.engine.catalog().load(), &model)?)
}

pub(super) async fn undivide(State(app): State<Arc<App>>, Named { model, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    change(&app, &model, why(&headers, &body)?, Change::Route(None)).await?;
    Ok(told_model(&app.engine.catalog().load(), &model)?)
}

pub(super) async fn call(State(app): State<Arc<App>>, Named { model, alias, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    let mut fields = Fields::parse(&body)?;
    let asked = asked(&headers, &mut fields)?;
    let version = fields.require("version")?;
    fields.finish(&["version", "author", "reason"])?;
    change(&app, &model, asked, Change::Alias(Alias::parse(&alias)?, Some(version))).await?;
    Ok(told_model(&app.engine.catalog().load(), &model)?)
}

pub(super) async fn uncall(State(app): State<Arc<App>>, Named { model, alias, .. }: Named, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    change(&app, &model, why(&headers, &body)?, Change::Alias(Alias::parse(&alias)?, None)).await?;
    Ok(told_model(&app.engine.catalog().load(), &model)?)
}

/// Checks the caller before the body is read, then reads it.
pub(super) async fn read(app: &App, request: Request) -> Result<(HeaderMap, Bytes), RestError> {
    app.check_admin(request.headers(), request.extensions().get())?;
    let (parts, body) = request.into_parts();
    Ok((parts.headers, read_body(app, body, app.limits.max_message_bytes).await?))
}

/// Who asks and why, of a body that says nothing else.
pub(super) fn why(headers: &HeaderMap, body: &[u8]) -> Result<Asked, Error> {
    let mut fields = Fields::parse(body)?;
    let asked = asked(headers, &mut fields)?;
    fields.finish(&["author", "reason"])?;
    Ok(asked)
}

/// Has the change made, and waits until it is in force.
pub(super) async fn change(app: &App, model: &str, asked: Asked, change: Change) -> Result<(), Refused> {
    let name = ModelName::parse(model)?;
    match until_closing(app, app.commands.change(name, asked, change)).await {
        Err(error) if error.code == Code::Conflict => {
            // A model that is gone meanwhile has no state.
            let state = status_of(&app.engine.catalog().load(), model).ok();
            Err(Refused::Conflict(Box::new(Refusal { error: error.message, state })))
        }
        done => Ok(done?),
    }
}

fn command(text: &str) -> Result<Command, Error> {
    Ok(match text {
        "pause" => Command::Pause,
        "resume" => Command::Resume,
        "advance" => Command::Advance,
        "promote" => Command::Promote,
        "abort" => Command::Abort,
        "rollback" => Command::Rollback,
        other => {
            let (other, known) = (shorten(other), COMMANDS.join(", "));
            return Err(Error::not_found(format!("a rollout cannot be told to '{other}'; there are {known}")));
        }
    })
}

/// What a body says of a route.
fn split(mut fields: Fields<'_>) -> Result<Split, Error> {
    let stable = fields.take::<Version>("stable")?;
    let canary = fields.take::<Share>("canary")?;
    let arms = fields.take::<Vec<ArmStatus>>("arms")?.unwrap_or_default();
    let shadow = fields.take::<Share>("shadow")?;
    let sticky = fields.take("sticky")?;
    fields.finish(&["stable", "canary", "arms", "shadow", "sticky", "author", "reason"])?;
    let canary = canary.map(|share| arm("canary", Variant::Canary, &share.version, share.percent)).transpose()?;
    let named = arms.into_iter().enumerate().map(|(index, ArmStatus { name, version, percent })| {
        arm(&format!("arms[{index}]"), Variant::Arm(name.into()), &version, percent)
    });
    let arms = canary.into_iter().map(Ok).chain(named).collect::<Result<_, Error>>()?;
    let shadow = shadow.map(|share| {
        let (version, weight) = parsed("shadow", &share.version, share.percent)?;
        Ok::<_, Error>(Shadow { version, weight })
    });
    Ok(Split { stable, arms, shadow: shadow.transpose()?, sticky })
}

fn arm(field: &str, variant: Variant, version: &str, percent: f64) -> Result<Arm, Error> {
    let (version, weight) = parsed(field, version, percent)?;
    Ok(Arm { variant, version, weight })
}

fn parsed(field: &str, version: &str, percent: f64) -> Result<(Version, Weight), Error> {
    let named = |key: &'static str| move |error: Error| Error::invalid(format!("field '{field}.{key}': {error}"));
    let version = Version::parse(version).map_err(named("version"))?;
    Ok((version, Weight::from_percent(percent).map_err(named("percent"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Split, Error> {
        split(Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn commands_are_those_of_the_list() {
        for text in COMMANDS {
            assert_eq!(serde_json::to_value(command(text).unwrap()).unwrap(), text);
        }
        assert!(command("stop").unwrap_err().message.contains("pause, resume, advance"));
    }

    #[test]
    fn a_route_is_read_whole() {
        let split = parse(
            r#"{ "stable": "1", "canary": { "version": "2", "percent": 12.5 }, "sticky": "header:X-User",
                 "arms": [{ "name": "blue", "version": "3", "percent": 5 }],
                 "shadow": { "version": "4", "percent": 100 } }"#,
        )
        .unwrap();
        let arms: Vec<_> = split.arms.iter().map(|arm| (arm.variant.as_str(), arm.version.as_str())).collect();
        assert_eq!(arms, [("canary", "2"), ("blue", "3")]);
        assert_eq!(split.arms[0].weight.parts_per_million(), 125_000);
        assert_eq!(split.shadow.unwrap().weight, Weight::FULL);
        assert_eq!(
            (split.stable.unwrap().as_str(), split.sticky.unwrap().to_string().as_str()),
            ("1", "header:x-user")
        );
        assert!(parse("{}").unwrap().arms.is_empty());
    }

    #[test]
    fn what_is_wrong_with_a_route_has_a_name() {
        for (body, wrong) in [
            (r#"{ "canary": { "version": "2", "percent": 101 } }"#, "field 'canary.percent': a weight must be"),
            (r#"{ "canary": { "version": "a/b", "percent": 1 } }"#, "field 'canary.version': version 'a/b' must be"),
            (r#"{ "canary": { "version": "2" } }"#, "field 'canary' in line 1: missing field `percent`"),
            (
                "{ \"arms\":\n [{ \"name\": \"a\",\n \"version\": 7 }] }",
                "field 'arms' in line 3: invalid type: integer",
            ),
            (r#"{ "arms": [{ "name": "a", "version": "1", "percent": -1 }] }"#, "field 'arms[0].percent'"),
            (r#"{ "shadow": { "version": "2", "weight": 1 } }"#, "unknown field `weight`"),
            (r#"{ "sticky": "cookie:a" }"#, "field 'sticky' in line 1: sticky must be"),
            (r#"{ "stable": "" }"#, "field 'stable' in line 1: version '' must be"),
            (r#"{ "weights": [] }"#, "unknown field 'weights' in line 1; there are stable, canary"),
        ] {
            let error = parse(body).map(drop).unwrap_err();
            assert!(error.message.starts_with(wrong) || error.message.contains(wrong), "{error}");
        }
    }
}
