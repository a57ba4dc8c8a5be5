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
    api::{App, repository::until_closing, rest::RestError},
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

/// Forgets what can be forgotten of every model. When some cannot, each of them is told, and what was done besides; the
/// code is the first one's.
async fn clear_all(app: &App, asked: &Asked) -> Result<Cleared, Error> {
    let mut cleared = Vec::new();
    let mut failed: Vec<(ModelName, Error)> = Vec::new();
    for (model, _) in overridden(app).await? {
        match until_closing(app, app.commands.change(model.clone(), asked.clone(), Change::Clear)).await {
            Ok(()) => cleared.push(model.to_string()),
            Err(error) => failed.push((model, error)),
        }
    }
    match failed.first() {
        None => Ok(Cleared { cleared }),
        Some((_, first)) => Err(Error { message: told(&failed, &cleared), ..first.clone() }),
    }
}

fn told(failed: &[(ModelName, Error)], cleared: &[String]) -> String {
    let failed = failed.iter().map(|(model, error)| format!("not cleared '{model}': {error}"));
    let cleared = (!cleared.is_empty()).then(|| format!("cleared {}", cleared.join(", ")));
    failed.chain(cleared).collect::<Vec<_>>().join("; ")
}

/// Models of which something is other than the repository has it.
async fn overridden(app: &App) -> Result<Vec<(ModelName, Standing)>, Error> {
    let mut standings = app.commands.overrides().await?;
    standings.retain(|(_, standing)| {
        standing.split.is_some() || !standing.passed_over.is_empty() || standing.running().is_some()
    });
    Ok(standings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn each_failure_is_told_and_what_was_cleared_besides() {
        let failed = [("a", "gone"), ("b", "busy")]
            .map(|(model, why)| (ModelName::parse(model).unwrap(), Error::new(Code::Conflict, why)));
        assert_eq!(told(&failed[..1], &[]), "not cleared 'a': gone");
        let cleared = ["c".to_owned(), "d".to_owned()];
        assert_eq!(told(&failed, &cleared), "not cleared 'a': gone; not cleared 'b': busy; cleared c, d");
    }
}
