//! Triton's repository extension: the index, and loading and unloading by request.
//!
//! Both protocols say the same with `pb::ModelRepositoryParameter`; REST writes files in base64.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    App,
    pb::{self, model_repository_parameter::ParameterChoice, repository_index_response::ModelIndex},
    rest::{Named, RestError, read_body},
    triton,
};
use crate::{
    control::{command::Load, upload},
    error::{Code, Error, abridge},
    id::{ModelName, shorten},
};

const CONFIG: &str = "config";
const UNLOAD_DEPENDENTS: &str = "unload_dependents";

type Parameters = HashMap<String, pb::ModelRepositoryParameter>;

/// Every version known, and with explicit control those that could be loaded; only those that serve when `ready`.
///
/// # Errors
/// `NotFound` for a repository by another name than the empty one, `Internal` when the repository cannot be read.
pub async fn index(app: &App, repository: &str, ready: bool) -> Result<Vec<ModelIndex>, Error> {
    check_repository(repository)?;
    if ready {
        return Ok(triton::index(&app.engine.catalog().load(), true));
    }
    let loadable = app.commands.loadable().await?;
    let catalog = app.engine.catalog().load();
    let mut index = triton::index(&catalog, false);
    for (name, found) in loadable.iter().filter(|(name, _)| !catalog.deployments.contains_key(*name)) {
        let unloaded = |version: String| ModelIndex {
            name: name.to_string(),
            version,
            state: "UNAVAILABLE".to_owned(),
            reason: "unloaded".to_owned(),
        };
        if found.versions.is_empty() {
            index.push(unloaded(String::new()));
        }
        index.extend(found.versions.iter().map(|found| unloaded(found.version.to_string())));
    }
    index.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(index)
}

/// Loads a model with the parameters `config` and `file:<version>/<name>`; answers when it serves or failed.
///
/// # Errors
/// What `Commands::load` says; `InvalidArgument` naming a parameter, `NotReady` when the server
/// stops.
pub async fn load(app: &App, repository: &str, model: &str, parameters: Parameters) -> Result<(), Error> {
    check_repository(repository)?;
    let model = ModelName::parse(model)?;
    let mut load = Load::default();
    for (name, parameter) in parameters {
        let wrong = |expected: &str| {
            let message = format!("parameter '{}' of a load must be {expected}", shorten(&name));
            Error::invalid(message).of_model(model.as_str())
        };
        match parameter.parameter_choice {
            Some(ParameterChoice::StringParam(text)) if name == CONFIG => load.config = Some(text),
            _ if name == CONFIG => return Err(wrong("the model configuration as a JSON string")),
            Some(ParameterChoice::BytesParam(bytes)) if name.starts_with(upload::PREFIX) => {
                load.files.push((name, bytes));
            }
            _ if name.starts_with(upload::PREFIX) => return Err(wrong("the bytes of the file")),
            _ => return Err(wrong("'config' or 'file:VERSION/NAME'")),
        }
    }
    until_closing(app, app.commands.load(model, load)).await
}

/// Unloads a model; answers when it takes no more requests. There are no ensembles, so `unload_dependents` finds none.
///
/// # Errors
/// What `Commands::unload` says; `InvalidArgument` naming a parameter.
pub async fn unload(app: &App, repository: &str, model: &str, parameters: Parameters) -> Result<(), Error> {
    check_repository(repository)?;
    let model = ModelName::parse(model)?;
    for (name, parameter) in parameters {
        let known = name == UNLOAD_DEPENDENTS;
        if !known || !matches!(parameter.parameter_choice, Some(ParameterChoice::BoolParam(_))) {
            let expected = if known { "true or false" } else { "'unload_dependents'" };
            let message = format!("parameter '{}' of an unload must be {expected}", shorten(&name));
            return Err(Error::invalid(message).of_model(model.as_str()));
        }
    }
    until_closing(app, app.commands.unload(model)).await
}

/// There is one repository, and it has no name.
fn check_repository(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::not_found(format!(
        "unknown repository '{}': this server has one, which is asked for without a name",
        shorten(name)
    )))
}

/// A load may take longer than the server has left.
pub(super) async fn until_closing(app: &App, command: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::select! {
        biased;
        answer = command => answer,
        () = app.closing.cancelled() => Err(Error::new(Code::NotReady, "the server is stopping")),
    }
}

/// The body of a load or an unload; as in Triton, it may say more than is understood.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Body {
    parameters: Map<String, Value>,
}

pub(super) async fn rest_index(
    State(app): State<Arc<App>>,
    named: Named,
    request: Request,
) -> Result<Response, RestError> {
    #[derive(Default, Deserialize)]
    struct Filter {
        #[serde(default)]
        ready: bool,
    }
    let body = read_body(&app, request.into_body(), app.limits.max_message_bytes).await?;
    let filter: Filter = parse(&body, "index")?;
    let index = index(&app, &named.repository, filter.ready).await?;
    let entry = |ModelIndex { name, version, state, reason }: ModelIndex| json!({ "name": name, "version": version, "state": state, "reason": reason });
    Ok(Json(index.into_iter().map(entry).collect::<Value>()).into_response())
}

pub(super) async fn rest_load(
    State(app): State<Arc<App>>,
    named: Named,
    request: Request,
) -> Result<Response, RestError> {
    let parameters = rest_parameters(&app, request, "load").await?;
    load(&app, &named.repository, &named.model, parameters).await?;
    Ok(Json(json!({})).into_response())
}

pub(super) async fn rest_unload(
    State(app): State<Arc<App>>,
    named: Named,
    request: Request,
) -> Result<Response, RestError> {
    let parameters = rest_parameters(&app, request, "unload").await?;
    unload(&app, &named.repository, &named.model, parameters).await?;
    Ok(Json(json!({})).into_response())
}

/// Checks the caller before the body is read, then reads it.
async fn rest_parameters(app: &App, request: Request, what: &str) -> Result<Parameters, RestError> {
    app.check_admin(request.headers(), request.extensions().get())?;
    let bytes = read_body(app, request.into_body(), app.limits.max_message_bytes).await?;
    let body: Body = parse(&bytes, what)?;
    Ok(body.parameters.into_iter().map(|(name, value)| parameter(name, value)).collect::<Result<_, Error>>()?)
}

fn parse<T: Default + for<'de> Deserialize<'de>>(body: &Bytes, what: &str) -> Result<T, Error> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body)
        .map_err(|error| Error::invalid(format!("the body is no {what} request: {}", abridge(&error.to_string()))))
}

/// A parameter as gRPC would say it.
fn parameter(name: String, value: Value) -> Result<(String, pb::ModelRepositoryParameter), Error> {
    let choice = match value {
        Value::String(text) if name.starts_with(upload::PREFIX) => {
            let bytes = STANDARD.decode(text).map_err(|error| {
                Error::invalid(format!("parameter '{}' must be the file's bytes in base64: {error}", shorten(&name)))
            })?;
            Some(ParameterChoice::BytesParam(bytes.into()))
        }
        Value::String(text) => Some(ParameterChoice::StringParam(text)),
        Value::Bool(value) => Some(ParameterChoice::BoolParam(value)),
        Value::Number(number) => number.as_i64().map(ParameterChoice::Int64Param),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    Ok((name, pb::ModelRepositoryParameter { parameter_choice: choice }))
}
