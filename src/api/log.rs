//! Triton's logging extension: its keys, over both protocols, for the settings of `logging`.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};

use super::{
    App,
    pb::{self, log_settings_request::setting_value::ParameterChoice},
    rest::{RestError, read_body},
};
use crate::{
    error::{Code, Error, abridge},
    id::shorten,
    logging::Settings,
};

const FILE: &str = "log_file";
const INFO: &str = "log_info";
const WARNING: &str = "log_warning";
const ERROR: &str = "log_error";
const VERBOSE_LEVEL: &str = "log_verbose_level";
const FORMAT: &str = "log_format";

const DEFAULT_FORMAT: &str = "default";
const ISO8601: &str = "ISO8601";

/// Settings as a request names them.
type Wishes = HashMap<String, Option<ParameterChoice>>;

/// Puts the settings that are named in force, all of them or none; all settings as they are then.
///
/// # Errors
/// `InvalidArgument` naming the key and what it takes, `Unimplemented` for a log file.
pub fn change(app: &App, settings: HashMap<String, pb::log_settings_request::SettingValue>) -> Result<Settings, Error> {
    let wishes: Wishes = settings.into_iter().map(|(key, value)| (key, value.parameter_choice)).collect();
    if wishes.is_empty() {
        return Ok(app.logging.settings());
    }
    let settings = app.logging.change(|settings| changed(settings, wishes))?;
    tracing::info!(?settings, "the log settings were changed");
    Ok(settings)
}

fn changed(mut settings: Settings, wishes: Wishes) -> Result<Settings, Error> {
    for (key, value) in wishes {
        let must_be = |what: &str| Error::invalid(format!("log setting '{}' must be {what}", shorten(&key)));
        let flag = match &value {
            Some(ParameterChoice::BoolParam(flag)) => Ok(*flag),
            _ => Err(must_be("true or false")),
        };
        let text = match &value {
            Some(ParameterChoice::StringParam(text)) => Ok(text.as_str()),
            _ => Err(must_be("a string")),
        };
        match key.as_str() {
            INFO => settings.info = flag?,
            WARNING => settings.warning = flag?,
            ERROR => settings.error = flag?,
            VERBOSE_LEVEL => match value {
                Some(ParameterChoice::Uint32Param(level)) => settings.verbose_level = level,
                _ => return Err(must_be("an integer from 0 on")),
            },
            FORMAT => match text? {
                DEFAULT_FORMAT => settings.iso8601 = false,
                ISO8601 => settings.iso8601 = true,
                _ => return Err(must_be("\"default\" or \"ISO8601\"")),
            },
            FILE if text?.is_empty() => {}
            FILE => {
                let message = "log setting 'log_file' cannot be set: this server writes to standard error only";
                return Err(Error::new(Code::Unimplemented, message));
            }
            unknown => {
                let known = [FILE, INFO, WARNING, ERROR, VERBOSE_LEVEL, FORMAT].join(", ");
                return Err(Error::invalid(format!("unknown log setting '{}'; there are {known}", shorten(unknown))));
            }
        }
    }
    Ok(settings)
}

/// Every key with its value.
fn choices(settings: &Settings) -> [(&'static str, ParameterChoice); 6] {
    let format = if settings.iso8601 { ISO8601 } else { DEFAULT_FORMAT };
    [
        (FILE, ParameterChoice::StringParam(String::new())),
        (INFO, ParameterChoice::BoolParam(settings.info)),
        (WARNING, ParameterChoice::BoolParam(settings.warning)),
        (ERROR, ParameterChoice::BoolParam(settings.error)),
        (VERBOSE_LEVEL, ParameterChoice::Uint32Param(settings.verbose_level)),
        (FORMAT, ParameterChoice::StringParam(format.to_owned())),
    ]
}

pub fn message(settings: &Settings) -> pb::LogSettingsResponse {
    use pb::log_settings_response::{SettingValue, setting_value::ParameterChoice as Told};
    let told = |(key, value): (&str, ParameterChoice)| {
        let value = match value {
            ParameterChoice::BoolParam(value) => Told::BoolParam(value),
            ParameterChoice::Uint32Param(value) => Told::Uint32Param(value),
            ParameterChoice::StringParam(value) => Told::StringParam(value),
        };
        (key.to_owned(), SettingValue { parameter_choice: Some(value) })
    };
    pb::LogSettingsResponse { settings: choices(settings).into_iter().map(told).collect() }
}

fn json(settings: &Settings) -> Response {
    let value = |value| match value {
        ParameterChoice::BoolParam(value) => Value::from(value),
        ParameterChoice::Uint32Param(value) => Value::from(value),
        ParameterChoice::StringParam(value) => Value::from(value),
    };
    let told = choices(settings).into_iter().map(|(key, choice)| (key.to_owned(), value(choice)));
    Json(told.collect::<Map<String, Value>>()).into_response()
}

pub(super) async fn rest_settings(State(app): State<Arc<App>>) -> Response {
    json(&app.logging.settings())
}

pub(super) async fn rest_change(State(app): State<Arc<App>>, request: Request) -> Result<Response, RestError> {
    app.check_admin(request.headers(), request.extensions().get())?;
    let body = read_body(&app, request.into_body(), app.limits.max_message_bytes).await?;
    let wishes: Map<String, Value> = if body.is_empty() {
        Map::new()
    } else {
        serde_json::from_slice(&body).map_err(|error| {
            Error::invalid(format!("the body is no object of log settings: {}", abridge(&error.to_string())))
        })?
    };
    let wish = |value| match value {
        Value::Bool(value) => Some(ParameterChoice::BoolParam(value)),
        Value::String(value) => Some(ParameterChoice::StringParam(value)),
        Value::Number(value) => value.as_u64()?.try_into().ok().map(ParameterChoice::Uint32Param),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    let value = |value| pb::log_settings_request::SettingValue { parameter_choice: wish(value) };
    let wishes = wishes.into_iter().map(|(key, wished)| (key, value(wished))).collect();
    Ok(json(&change(&app, wishes)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(wishes: &[(&str, ParameterChoice)]) -> Result<Settings, Error> {
        let wishes = wishes.iter().map(|(key, value)| (key.to_string(), Some(value.clone()))).collect();
        changed(Settings::default(), wishes)
    }

    #[test]
    fn settings_go_both_ways() {
        let wished = Settings { error: false, warning: false, info: false, verbose_level: 2, iso8601: true };
        assert_eq!(wish(&choices(&wished)).unwrap(), wished);
    }

    #[test]
    fn mistakes_name_the_key_and_what_it_takes() {
        use ParameterChoice::{BoolParam, StringParam, Uint32Param};
        for (key, value, word) in [
            ("log_warnings", BoolParam(true), "log_warning, log_error"),
            (INFO, Uint32Param(1), "true or false"),
            (VERBOSE_LEVEL, BoolParam(true), "integer"),
            (FORMAT, StringParam("iso".to_owned()), "ISO8601"),
            (FILE, StringParam("/var/log/tidegate".to_owned()), "standard error"),
        ] {
            let error = wish(&[(key, value)]).unwrap_err();
            assert!(error.message.contains(key) && error.message.contains(word), "{error}");
        }
        assert!(changed(Settings::default(), [(INFO.to_owned(), None)].into()).is_err());
    }
}
