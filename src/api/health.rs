//! `grpc.health.v1`: the server under "", each model under its name.
//!
//! Watches wake with every new catalog, and when the server begins to drain.

use std::{pin::Pin, sync::Arc};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

use super::App;
use crate::{error::Error, id::shorten};

/// The service's own description, for reflection.
pub const DESCRIPTORS: &[u8] = tonic_health::pb::FILE_DESCRIPTOR_SET;

pub fn service(app: Arc<App>) -> HealthServer<impl Health> {
    HealthServer::new(Service { app })
}

struct Service {
    app: Arc<App>,
}

/// The status of the server or of a model; `None` when there is no such model.
fn status(app: &App, name: &str) -> Option<ServingStatus> {
    let serving = if name.is_empty() {
        app.is_ready()
    } else {
        app.engine.catalog().load().deployments.get(name)?.default.is_some()
    };
    Some(if serving { ServingStatus::Serving } else { ServingStatus::NotServing })
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let name = request.into_inner().service;
        match status(&self.app, &name) {
            Some(status) => Ok(Response::new(answer(status))),
            None => Err(Error::not_found(format!("unknown model '{}'", shorten(&name))).into()),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().service;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let app = self.app.clone();
        tokio::spawn(async move {
            let mut changes = app.engine.catalog().changes();
            let mut last = None;
            loop {
                // Looked at before the status, so that a change in between wakes the watch.
                let drains = app.draining.is_cancelled();
                let now = status(&app, &name).unwrap_or(ServingStatus::ServiceUnknown);
                if last != Some(now) {
                    last = Some(now);
                    if sender.send(Ok(answer(now))).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    () = sender.closed() => return,
                    () = app.closing.cancelled() => return,
                    () = app.draining.cancelled(), if !drains => {}
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }
}
