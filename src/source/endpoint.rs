//! Which of all places a URI means: where the environment has it, when that is not the usual place.

use reqwest::Url;

use super::{Scheme, SourceUri};
use crate::id::ModelName;

/// What stands in a mirror's key before the endpoint; no URI and no name has a space.
pub const AT: &str = " at ";

/// Where the Hub is when the environment does not say.
const HUB: &str = "https://huggingface.co";

/// What a mirror goes by: the URI, the name of the one model that it is for (two models from one place have a mirror each,
/// which share the contents), and where the environment has the place.
///
/// With another `MLFLOW_TRACKING_URI`, `HF_ENDPOINT` or `AWS_ENDPOINT_URL`, a URI is another place and has another mirror;
/// the one before stays, and is found again with the endpoint before. The usual endpoint adds nothing. A mirror that is
/// from a server that did not tell endpoints apart is taken over by the first endpoint that asks for it.
pub fn key(uri: &SourceUri, name: Option<&ModelName>) -> String {
    let name = name.map(|name| format!(" as {name}")).unwrap_or_default();
    let endpoint = endpoint(uri).map(|endpoint| format!("{AT}{endpoint}")).unwrap_or_default();
    format!("{uri}{name}{endpoint}")
}

/// Where the environment has the place of a URI, without credentials; `None` when it says nothing of it.
pub fn endpoint(uri: &SourceUri) -> Option<String> {
    in_environment(uri, |name| std::env::var(name).ok())
}

fn in_environment(uri: &SourceUri, variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    // Of those that mean the same, the first holds.
    let names: &[&[&str]] = match uri.scheme() {
        Scheme::S3 => &[&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]],
        Scheme::Gs => &[&["GOOGLE_BASE_URL"]],
        Scheme::Az => &[
            &["AZURE_STORAGE_ACCOUNT_NAME"],
            &["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"],
            &["AZURITE_BLOB_STORAGE_URL", "AZURE_STORAGE_USE_EMULATOR"],
        ],
        Scheme::Models => &[&["MLFLOW_TRACKING_URI"], &["MLFLOW_WORKSPACE"]],
        Scheme::Mlflow | Scheme::MlflowHttps => &[&["MLFLOW_WORKSPACE"]],
        Scheme::Hf => &[&["HF_ENDPOINT"]],
        Scheme::Folder | Scheme::Http | Scheme::Https | Scheme::Oci | Scheme::OciHttp | Scheme::Dvc => &[],
    };
    let set = |name: &&str| variable(name).map(|text| plain(text.trim())).filter(|text| !text.is_empty());
    let said: Vec<String> = names.iter().filter_map(|names| names.iter().find_map(set)).collect();
    let said = said.join(" ");
    let is_usual = said.is_empty() || uri.scheme() == Scheme::Hf && said == HUB;
    (!is_usual).then_some(said)
}

/// A setting as a key may show it: a URL without its login and query.
fn plain(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return text.split_whitespace().collect() };
    // Either may fail for what has no host, and no login then.
    let _ = (url.set_username(""), url.set_password(None));
    url.set_query(None);
    url.set_fragment(None);
    url.as_str().trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_environment_says_of_a_place_is_part_of_what_it_is() {
        let of = |uri: &str, environment: &[(&str, &str)]| {
            let set = |name: &str| environment.iter().find(|(set, _)| *set == name).map(|(_, text)| (*text).to_owned());
            in_environment(&SourceUri::parse(uri).unwrap(), set)
        };
        let (hub, mlflow) = ("hf://acme/iris", "models:/iris@champion");
        assert_eq!(of(hub, &[]), None);
        assert_eq!(of(hub, &[("HF_ENDPOINT", "https://huggingface.co/")]), None);
        assert_eq!(of(hub, &[("HF_ENDPOINT", "http://mirror:8080/")]).as_deref(), Some("http://mirror:8080"));
        let one = of(mlflow, &[("MLFLOW_TRACKING_URI", "https://ada:SECRET@one/ml?x=SECRET")]);
        assert_eq!(one.as_deref(), Some("https://one/ml"));
        let workspace = [("MLFLOW_TRACKING_URI", "http://one:5000"), ("MLFLOW_WORKSPACE", "team a")];
        assert_eq!(of(mlflow, &workspace).as_deref(), Some("http://one:5000 teama"));
        assert_eq!(of("mlflow://one/iris/3", &workspace[..1]), None);
        let s3 = [("AWS_ENDPOINT_URL", "http://here:9000"), ("AWS_ENDPOINT_URL_S3", "http://there:9000")];
        assert_eq!(of("s3://bucket", &s3).as_deref(), Some("http://there:9000"));
        assert_eq!(of("gs://bucket", &s3), None);
        assert_eq!(of("az://container", &[("AZURE_STORAGE_ACCOUNT_NAME", "acme")]).as_deref(), Some("acme"));
        assert_eq!(of("oci://host/iris:v1", &s3), None);
    }
}
