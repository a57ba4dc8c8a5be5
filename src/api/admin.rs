//! What operators ask and change: models, rollouts, routes by hand, and the audit log.
//!
//! Everybody who reaches the port may read; changes need `App::check_admin`. A change answers when it is stored and in
//! force, with the state it led to.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    extract::{RawQuery, State},
    response::{IntoResponse, Response},
};
use http::header;
use serde_json::json;

use super::{
    App,
    rest::{Named, RestError},
};
use crate::{
    error::{Code, Error},
    id::ModelName,
    model::catalog::{Catalog, Deployment},
    rollout::{Moment, Rollout},
};

mod asked;
mod change;
pub mod documents;
pub mod openapi;
mod overrides;
mod query;
pub mod requests;
mod sources;
mod told;
mod version;

use documents::{
    AuditEntry, AuditPage, Cleared, ModelStatus, OverrideStatus, RolloutStatus, SourceStatus, VersionDetails,
};
use openapi::Operation;
use query::Query;
use requests::{AliasRequest, RouteRequest, StartRequest, Why};

const MODELS: &str = "/admin/v1/models";
const MODEL: &str = "/admin/v1/models/{model}";
const VERSION: &str = "/admin/v1/models/{model}/versions/{version}";
const ROLLOUT: &str = "/admin/v1/models/{model}/rollout";
const COMMAND: &str = "/admin/v1/models/{model}/rollout/{command}";
const ROUTE: &str = "/admin/v1/models/{model}/route";
const ALIAS: &str = "/admin/v1/models/{model}/aliases/{alias}";
const SOURCES: &str = "/admin/v1/sources";
const OVERRIDES: &str = "/admin/v1/overrides";
const AUDIT: &str = "/admin/v1/audit";

/// Entries of the audit log in one answer: so many unless asked for more or fewer, and at most.
const PAGE: u64 = 100;
const LARGEST_PAGE: u64 = 1000;

/// Everything below `/admin/v1`.
pub fn operations() -> Vec<Operation> {
    let commands = json!({ "type": "string", "enum": change::COMMANDS });
    vec![
        Operation::get::<Vec<ModelStatus>, _, _>(MODELS, "listModels", "Every model with its versions.", models),
        Operation::get::<ModelStatus, _, _>(MODEL, "getModel", "One model with its versions.", model)
            .with_epoch()
            .failing(&[Code::NotFound]),
        Operation::get::<VersionDetails, _, _>(
            VERSION,
            "getModelVersion",
            "One version: what its files are, where they are from, and what is known of how they were made.",
            version::show,
        )
        .failing(&[Code::NotFound]),
        Operation::get::<Vec<SourceStatus>, _, _>(
            SOURCES,
            "listSources",
            "The places that models are mirrored from.",
            sources::list,
        ),
        Operation::get::<RolloutStatus, _, _>(ROLLOUT, "getRollout", "A model's rollout, now or the last.", rollout)
            .with_epoch()
            .failing(&[Code::NotFound]),
        Operation::change::<RolloutStatus, _, _>(["POST", ROLLOUT], "startRollout", "Starts a rollout.", change::start)
            .with_body::<StartRequest>(true)
            .with_epoch(),
        Operation::change::<RolloutStatus, _, _>(
            ["POST", COMMAND],
            "commandRollout",
            "Has the rollout pause, go on, or end.",
            change::tell,
        )
        .with_values("command", "What it shall do.", commands)
        .with_body::<Why>(false)
        .with_epoch(),
        Operation::change::<ModelStatus, _, _>(
            ["PUT", ROUTE],
            "setRoute",
            "Divides a model's requests by hand; not while a rollout runs.",
            change::divide,
        )
        .with_body::<RouteRequest>(true)
        .with_epoch(),
        Operation::change::<ModelStatus, _, _>(
            ["DELETE", ROUTE],
            "resetRoute",
            "Has the repository say again who gets a model's requests.",
            change::undivide,
        )
        .with_body::<Why>(false)
        .with_epoch(),
        Operation::change::<ModelStatus, _, _>(
            ["PUT", ALIAS],
            "setAlias",
            "Has an alias stand for a version. That of the alias which the model follows (champion unless its settings say \
             otherwise) is the one to serve from then on, and takes over as any new version does.",
            change::call,
        )
        .with_body::<AliasRequest>(true)
        .with_epoch(),
        Operation::change::<ModelStatus, _, _>(
            ["DELETE", ALIAS],
            "removeAlias",
            "Has an alias stand for no version any more.",
            change::uncall,
        )
        .with_body::<Why>(false)
        .with_epoch(),
        Operation::get::<AuditPage, _, _>(AUDIT, "listAudit", "What was changed by whom and why, oldest first.", audit)
            .with_query("model", "Of one model only.", json!({ "type": "string" }))
            .with_query(
                "since",
                "From this time on: RFC 3339, or milliseconds since 1970.",
                json!({ "type": ["string", "integer"] }),
            )
            .with_query("after", "Behind the entry of this number.", json!({ "type": "integer", "minimum": 0 }))
            .with_query(
                "limit",
                "So many entries at most; `next` says where they go on.",
                json!({ "type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": PAGE }),
            )
            .failing(&[Code::InvalidArgument, Code::NotReady]),
        Operation::get::<Vec<OverrideStatus>, _, _>(
            OVERRIDES,
            "listOverrides",
            "What is other than the repository has it.",
            overrides::list,
        )
        .failing(&[Code::NotReady]),
        Operation::change::<Cleared, _, _>(
            ["DELETE", OVERRIDES],
            "clearOverrides",
            "Forgets what is other than the repository has it, with the last rollout and its history.",
            overrides::clear,
        )
        .with_query("model", "Of one model only.", json!({ "type": "string" }))
        .with_body::<Why>(false),
    ]
}

async fn models(State(app): State<Arc<App>>) -> Json<Vec<ModelStatus>> {
    let catalog = app.engine.catalog().load();
    Json(catalog.deployments.iter().map(|(name, deployment)| ModelStatus::new(name, deployment)).collect())
}

async fn model(State(app): State<Arc<App>>, Named { model, .. }: Named) -> Result<Response, RestError> {
    Ok(told_model(&app.engine.catalog().load(), &model)?)
}

async fn rollout(State(app): State<Arc<App>>, Named { model, .. }: Named) -> Result<Response, RestError> {
    Ok(told_rollout(&app.engine.catalog().load(), &model)?)
}

fn told_model(catalog: &Catalog, model: &str) -> Result<Response, Error> {
    let status = status_of(catalog, model)?;
    Ok((etag(status.epoch), Json(status)).into_response())
}

fn told_rollout(catalog: &Catalog, model: &str) -> Result<Response, Error> {
    let deployment = catalog.deployment(model)?;
    let (name, rollout) = catalog
        .deployments
        .get_key_value(model)
        .and_then(|(name, deployment)| Some((name, deployment.rollout.as_deref()?)))
        .ok_or_else(|| {
            let start = format!("start one (tidegate rollout start {model} --to VERSION)");
            Error::not_found(format!("model '{model}' has had no rollout; {start}"))
        })?;
    Ok(shown_rollout(name, rollout, deployment.epoch, Some(deployment)))
}

/// `deployment` is `None` of a model that has left the repository.
fn shown_rollout(name: &ModelName, rollout: &Rollout, epoch: u64, deployment: Option<&Deployment>) -> Response {
    (etag(epoch), Json(RolloutStatus::new(name, rollout, epoch, deployment, now()))).into_response()
}

fn status_of(catalog: &Catalog, model: &str) -> Result<ModelStatus, Error> {
    let deployment = catalog.deployment(model)?;
    let name = ModelName::parse(model)?;
    Ok(ModelStatus::new(&name, deployment))
}

fn etag(epoch: u64) -> [(header::HeaderName, String); 1] {
    [(header::ETAG, format!("\"{epoch}\""))]
}

fn now() -> Moment {
    // Before 1970 it is 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as Moment)
}

async fn audit(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Result<Response, RestError> {
    let query = Query::parse(query.as_deref(), &["model", "since", "after", "limit"])?;
    let model = query.get("model").map(ModelName::parse).transpose()?;
    let (model, since) = (model.as_ref().map(ModelName::as_str), query.moment("since")?);
    let after = query.number("after", 0, [0, i64::MAX as u64])?;
    let limit = query.number("limit", PAGE, [1, LARGEST_PAGE])?;
    // One more than is wanted tells whether there are more.
    let mut found = app.commands.audit(model, since, after, limit as usize + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| more).map(|last| {
        let model = model.map(|model| format!("model={model}&")).unwrap_or_default();
        format!("{AUDIT}?{model}since={since}&after={}&limit={limit}", last.number)
    });
    Ok(Json(AuditPage { entries: found.into_iter().map(AuditEntry::from).collect(), next }).into_response())
}
