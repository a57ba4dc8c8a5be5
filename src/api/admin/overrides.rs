//! What was changed beyond what the repository says, and how it is forgotten.

use std::sync::Arc;

use axum::{
    Json,
    extract::{RawQuery, Request, State},
    response::{IntoResponse, Response},
};

use super::{
    change::{Answer, change, read, why},
    documents::{Cleared, OverrideStatus},
    query::Query,
};
use crate::{
    api::{App, rest::RestError},
    control::{
        command::{Asked, Change},
        standing::Standing,
    },
    error::Error,
    id::ModelName,
};

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Response, RestError> {
    let overridden = overridden(&app).await?;
    let statuses = overridden.iter().map(|(model, standing)| OverrideStatus::new(model, standing));
    Ok(Json(statuses.collect::<Vec<_>>()).into_response())
}

/// Forgets the overrides of the model that the query names, else of all.
pub(super) async fn clear(State(app): State<Arc<App>>, RawQuery(query): RawQuery, request: Request) -> Answer {
    let (headers, body) = read(&app, request).await?;
    let query = Query::parse(query.as_deref(), &["model"])?;
    let asked = why(&headers, &body)?;
    if let Some(model) = query.get("model") {
        change(&app, model, asked, Change::Clear).await?;
        return Ok(Json(Cleared { cleared: vec![model.to_owned()] }).into_response());
    }
    if asked.epoch.is_some() {
        return Err(Error::invalid("header If-Match needs the query parameter 'model': each has its own epoch").into());
    }
    Ok(Json(clear_all(&app, &asked).await?).into_response())
}

/// Forgets what can be forgotten of every model; the first failure, with what was done besides, when some cannot.
async fn clear_all(app: &App, asked: &Asked) -> Result<Cleared, Error> {
    let mut cleared = Vec::new();
    let mut failed: Option<Error> = None;
    for (model, _) in overridden(app).await? {
        match app.commands.change(model.clone(), asked.clone(), Change::Clear).await {
            Ok(()) => cleared.push(model.to_string()),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        None => Ok(Cleared { cleared }),
        Some(error) if cleared.is_empty() => Err(error),
        Some(error) => {
            let message = format!("{error}; cleared were those of {}", cleared.join(", "));
            Err(Error { message, ..error })
        }
    }
}

/// Models of which something is other than the repository has it.
async fn overridden(app: &App) -> Result<Vec<(ModelName, Standing)>, Error> {
    let mut standings = app.commands.overrides().await?;
    standings.retain(|(_, standing)| {
        standing.split.is_some() || !standing.passed_over.is_empty() || standing.running().is_some()
    });
    Ok(standings)
}
