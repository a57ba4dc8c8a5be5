//! The routes of the operators' port as one list: the router is made of it, and so is the OpenAPI document.
//!
//! What is not in the list cannot be asked for, and what is in it is described.

use std::sync::Arc;

use axum::{
    Router,
    handler::Handler,
    routing::{MethodFilter, MethodRouter, on},
};
use http::{Method, StatusCode, header};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    asked::{AUTHOR, MAX_AUTHOR},
    documents::Refusal,
};
use crate::{
    api::{App, status},
    error::Code,
};

/// The version of the specification that the document keeps to.
const OPENAPI: &str = "3.1.1";
const JSON: &str = "application/json";
/// How a change may fail, whatever it is.
const CHANGE_FAILURES: [Code; 7] = [
    Code::InvalidArgument,
    Code::Unauthenticated,
    Code::Forbidden,
    Code::NotFound,
    Code::Conflict,
    Code::TooLarge,
    Code::NotReady,
];

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// One method of one path.
pub struct Operation {
    method: Method,
    path: &'static str,
    /// Its name in generated clients.
    id: &'static str,
    summary: &'static str,
    parameters: Vec<Value>,
    /// What it is asked with, and whether it has to be.
    body: Option<(SchemaOf, bool)>,
    /// Media type and shape of the good answer.
    answer: (&'static str, SchemaOf),
    has_epoch: bool,
    is_change: bool,
    failures: Vec<(Code, SchemaOf)>,
    serve: MethodRouter<Arc<App>>,
}

impl Operation {
    /// A way to read, which answers with a `T` in JSON.
    pub fn get<T: JsonSchema, H: Handler<X, Arc<App>>, X: 'static>(
        path: &'static str,
        id: &'static str,
        summary: &'static str,
        handler: H,
    ) -> Self {
        Self {
            method: Method::GET,
            path,
            id,
            summary,
            parameters: path_parameters(path),
            body: None,
            answer: (JSON, SchemaGenerator::subschema_for::<T>),
            has_epoch: false,
            is_change: false,
            failures: Vec::new(),
            serve: on(MethodFilter::GET, handler),
        }
    }

    /// A way to change a model, which answers with its state, a `T` in JSON.
    pub fn change<T: JsonSchema, H: Handler<X, Arc<App>>, X: 'static>(
        [method, path]: [&'static str; 2],
        id: &'static str,
        summary: &'static str,
        handler: H,
    ) -> Self {
        let (method, filter) = match method {
            "PUT" => (Method::PUT, MethodFilter::PUT),
            "DELETE" => (Method::DELETE, MethodFilter::DELETE),
            _ => (Method::POST, MethodFilter::POST),
        };
        let epoch = "The epoch that was seen last, in quotes, as an ETag says it: when the model has changed since, \
                     nothing is done and the answer is 409. Without it, or with *, any epoch will do.";
        let author = format!("Who asks, when the body does not say it; {MAX_AUTHOR} characters at most.");
        Self {
            method,
            is_change: true,
            failures: CHANGE_FAILURES.map(refused).to_vec(),
            serve: on(filter, handler),
            ..Self::get::<T, _, _>(path, id, summary, || async {})
        }
        .with("header", header::IF_MATCH.as_str(), epoch, json!({ "type": "string" }))
        .with("header", AUTHOR.as_str(), &author, json!({ "type": "string", "default": "operator" }))
    }

    /// Answers with a text instead.
    pub fn text(mut self, media_type: &'static str) -> Self {
        self.answer = (media_type, SchemaGenerator::subschema_for::<String>);
        self
    }

    /// Says the model's epoch in an ETag.
    pub fn with_epoch(mut self) -> Self {
        self.has_epoch = true;
        self
    }

    pub fn with_body<T: JsonSchema>(mut self, required: bool) -> Self {
        self.body = Some((SchemaGenerator::subschema_for::<T>, required));
        self
    }

    pub fn with_query(self, name: &str, description: &str, schema: Value) -> Self {
        self.with("query", name, description, schema)
    }

    /// Says what stands for a part of the path.
    pub fn with_values(mut self, name: &str, description: &str, schema: Value) -> Self {
        self.parameters.retain(|parameter| parameter["name"] != name);
        self.with("path", name, description, schema)
    }

    pub fn failing(mut self, codes: &[Code]) -> Self {
        self.failures.extend(codes.iter().copied().map(refused));
        self
    }

    /// Fails with a `T` instead of a sentence.
    pub fn failing_with<T: JsonSchema>(mut self, code: Code) -> Self {
        self.failures.push((code, SchemaGenerator::subschema_for::<T>));
        self
    }

    fn with(mut self, place: &str, name: &str, description: &str, schema: Value) -> Self {
        let required = place == "path";
        self.parameters.push(
            json!({ "in": place, "name": name, "required": required, "description": description, "schema": schema }),
        );
        self
    }

    fn describe(&self, schemas: &mut SchemaGenerator) -> Value {
        let content = |media_type: &str, schema: Schema| json!({ media_type: { "schema": schema } });
        let (media_type, schema) = self.answer;
        let mut good = json!({ "description": "Done.", "content": content(media_type, schema(schemas)) });
        if self.has_epoch {
            let etag = json!({ "description": "The model's epoch, in quotes.", "schema": { "type": "string" } });
            good["headers"] = json!({ "ETag": etag });
        }
        let mut responses = Map::from_iter([("200".to_owned(), good)]);
        for &(code, schema) in &self.failures {
            let described = json!({ "description": meaning(code), "content": content(JSON, schema(schemas)) });
            responses.insert(status::http(code).as_u16().to_string(), described);
        }
        if self.body.is_some() {
            // A body that pauses is the only failure whose status is not that of its code: nothing here is late.
            let described = json!({
                "description": "The body paused for longer than limits.body_timeout.",
                "content": content(JSON, schemas.subschema_for::<Refusal>()),
            });
            responses.insert(StatusCode::REQUEST_TIMEOUT.as_str().to_owned(), described);
        }
        let mut described = json!({
            "operationId": self.id,
            "summary": self.summary,
            "parameters": self.parameters,
            "responses": responses,
        });
        if let Some((schema, required)) = self.body {
            described["requestBody"] = json!({ "required": required, "content": content(JSON, schema(schemas)) });
        }
        if self.is_change {
            // Without a token, the server takes changes from its own machine only.
            described["security"] = json!([{ "token": [] }, {}]);
        }
        described
    }
}

/// A failure that is told in a sentence.
fn refused(code: Code) -> (Code, SchemaOf) {
    (code, SchemaGenerator::subschema_for::<Refusal>)
}

/// What each code means here.
fn meaning(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "The request says something that can never work; the error names the field.",
        Code::NotFound => "There is no such model, version or rollout.",
        Code::NotReady => "Not now: the server is not ready, stops, or cannot store its state.",
        Code::TooLarge => "The body is larger than limits.max_message_bytes.",
        Code::Unauthenticated => "The server has a token, and the request has another or none.",
        Code::Forbidden => "The server has no token, and the request comes from another machine, a page or a proxy.",
        Code::Conflict => "It cannot be done as things stand now; `state` says how they do.",
        Code::Overloaded | Code::DeadlineExceeded | Code::Cancelled | Code::Unimplemented | Code::Internal => {
            "The server failed."
        }
    }
}

fn path_parameters(path: &str) -> Vec<Value> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    names.map(|name| json!({ "in": "path", "name": name, "required": true, "schema": { "type": "string" } })).collect()
}

/// What serves the operations.
pub fn router(operations: Vec<Operation>) -> Router<Arc<App>> {
    operations.into_iter().fold(Router::new(), |router, operation| router.route(operation.path, operation.serve))
}

/// What describes them.
pub fn document(operations: &[Operation]) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.meta_schema = None;
        settings.definitions_path = "/components/schemas".into();
    });
    let mut schemas = settings.into_generator();
    let mut paths = Map::new();
    for operation in operations {
        let described = operation.describe(&mut schemas);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.as_str().to_ascii_lowercase()] = described;
    }
    let token = json!({ "type": "http", "scheme": "bearer", "description": "The server's --token." });
    json!({
        "openapi": OPENAPI,
        "info": {
            "title": "Tidegate, the operators' port",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache 2.0", "identifier": env!("CARGO_PKG_LICENSE") },
        },
        "paths": paths,
        "components": { "schemas": schemas.take_definitions(true), "securitySchemes": { "token": token } },
    })
}
