//! The calls about regions, over both protocols: register, unregister, status.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Reach, region::Region};
use crate::{
    api::{
        App,
        pb::{self, system_shared_memory_status_response::RegionStatus},
        rest::{RestError, read_body},
    },
    error::{Error, abridge},
};

impl Reach {
    /// # Errors
    /// `InvalidArgument`, `NotFound`, `Forbidden` or `TooLarge` naming the region and what is wrong with it.
    pub fn register(&self, wish: &pb::SystemSharedMemoryRegisterRequest) -> Result<(), Error> {
        self.regions()?.register(&wish.name, &wish.key, wish.offset, wish.byte_size)?;
        tracing::info!(region = wish.name, key = wish.key, bytes = wish.byte_size, "shared memory registered");
        Ok(())
    }

    /// Forgets the region, or every one when the name is empty.
    ///
    /// # Errors
    /// Only when the caller may not.
    pub fn unregister(&self, name: &str) -> Result<(), Error> {
        self.regions()?.unregister(name);
        Ok(())
    }

    /// The region, or every one when the name is empty.
    ///
    /// # Errors
    /// `NotFound` for a name that is not registered.
    pub fn status(&self, name: &str) -> Result<Vec<RegionStatus>, Error> {
        let status = |region: Arc<Region>| RegionStatus {
            name: region.name.clone(),
            key: region.key.clone(),
            offset: region.offset,
            byte_size: region.byte_size,
        };
        Ok(self.regions()?.list(name)?.into_iter().map(status).collect())
    }
}

pub(in crate::api) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v2/systemsharedmemory/status", get(status))
        .route("/v2/systemsharedmemory/unregister", post(unregister))
        .route("/v2/systemsharedmemory/region/{region}/status", get(status))
        .route("/v2/systemsharedmemory/region/{region}/register", post(register))
        .route("/v2/systemsharedmemory/region/{region}/unregister", post(unregister))
}

/// The name in the path; empty where it has none.
type Named = Option<Path<String>>;

fn name(named: Named) -> String {
    named.map(|Path(name)| name).unwrap_or_default()
}

async fn status(State(app): State<Arc<App>>, named: Named, request: Request) -> Result<Response, RestError> {
    let regions = Reach::of(&app, request.headers(), request.extensions().get()).status(&name(named))?;
    let entry = |region: RegionStatus| {
        let RegionStatus { name, key, offset, byte_size } = region;
        json!({ "name": name, "key": key, "offset": offset, "byte_size": byte_size })
    };
    Ok(Json(regions.into_iter().map(entry).collect::<Value>()).into_response())
}

async fn register(State(app): State<Arc<App>>, named: Named, request: Request) -> Result<Response, RestError> {
    #[derive(Deserialize)]
    struct Wish {
        key: String,
        #[serde(default)]
        offset: u64,
        byte_size: u64,
    }
    let reach = Reach::of(&app, request.headers(), request.extensions().get());
    // Nothing is read of those who may not.
    reach.regions()?;
    let body = read_body(&app, request.into_body(), app.limits.max_message_bytes).await?;
    let Wish { key, offset, byte_size } = serde_json::from_slice(&body).map_err(|error| {
        Error::invalid(format!("the body is no shared memory region: {}", abridge(&error.to_string())))
    })?;
    reach.register(&pb::SystemSharedMemoryRegisterRequest { name: name(named), key, offset, byte_size })?;
    Ok(Json(json!({})).into_response())
}

async fn unregister(State(app): State<Arc<App>>, named: Named, request: Request) -> Result<Response, RestError> {
    Reach::of(&app, request.headers(), request.extensions().get()).unregister(&name(named))?;
    Ok(Json(json!({})).into_response())
}
