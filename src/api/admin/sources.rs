//! The places that models are mirrored from.

use std::{sync::Arc, time::SystemTime};

use axum::{Json, extract::State};
use humantime_serde::re::humantime::format_rfc3339_millis;

use super::documents::{FetchingStatus, SourceProblem, SourceStatus, WriteBackStatus};
use crate::{api::App, source::follow::Status};

pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Vec<SourceStatus>> {
    Json(app.sources.read().into_iter().map(SourceStatus::from).collect())
}

impl From<Status> for SourceStatus {
    fn from(status: Status) -> Self {
        let (away_since, error) = status.away.map(|(since, error)| (moment(since), error)).unzip();
        let fetching = status.fetching.into_iter().map(|((model, version), one)| FetchingStatus {
            model: model.to_string(),
            version,
            fetched_bytes: one.fetched,
            total_bytes: one.total,
            since: moment(one.since),
        });
        let problems = status.problems.into_iter().map(|((model, version), problem)| SourceProblem {
            model: model.to_string(),
            version,
            error: problem.error.to_string(),
            since: moment(problem.since),
        });
        let write_back = status.write_back.map(|written| {
            let (since, error) = written.failed.map(|(since, error)| (moment(since), error)).unzip();
            WriteBackStatus { last: written.last.map(moment), error, since, alias: written.alias }
        });
        Self {
            uri: status.uri,
            answered: status.answered.map(moment),
            away_since,
            error,
            failures: status.failures,
            given_up: status.given_up,
            fetching: fetching.collect(),
            problems: problems.collect(),
            write_back,
        }
    }
}

fn moment(at: SystemTime) -> String {
    format_rfc3339_millis(at).to_string()
}
