//! The Hub, against servers whose answers are the test's.

use std::collections::HashMap;

use axum::{Router, body::Body, extract::Request};
use tokio::net::TcpListener;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Of `hello` and a line's end, by `sha256sum` and `git hash-object`.
const SHA256: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
const GIT: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

/// A server on a port of its own, until the test ends.
struct Place {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Asked {
    /// With the query.
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Place {
    async fn new(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (told, answer) = (asked.clone(), Arc::new(answer));
        let router = Router::new().fallback(move |request: Request| {
            let header = |name| Some(request.headers().get(name)?.to_str().unwrap().to_owned());
            assert_eq!(header("accept-encoding").unwrap(), "identity");
            let path = request.uri().path_and_query().unwrap().to_string();
            let asked = Asked { path, authorization: header("authorization"), range: header("range") };
            let given = answer(&asked);
            told.lock().push(asked);
            async move {
                let mut response = axum::response::Response::builder().status(given.status);
                for (name, value) in given.headers {
                    response = response.header(name, value);
                }
                response.body(Body::from(given.body)).unwrap()
            }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock())
    }

    fn paths(&self) -> Vec<String> {
        self.asked().into_iter().map(|asked| asked.path).collect()
    }
}

fn answer(status: u16, headers: &[(&'static str, &str)], body: impl Into<Vec<u8>>) -> Answer {
    let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Answer { status, headers, body: body.into() }
}

fn environment(settings: &[(&str, &str)]) -> Result<Environment, SourceError> {
    let settings: HashMap<_, _> = settings.iter().copied().collect();
    Environment::read(|name| settings.get(name).map(ToString::to_string))
}

fn hub(uri: &str, settings: &[(&str, &str)]) -> Hub {
    Hub::with(&SourceUri::parse(uri).unwrap(), environment(settings).unwrap()).unwrap()
}

/// The repository `acme/iris` at a server, read with a token.
fn iris(place: &Place) -> Hub {
    hub("hf://acme/iris", &[("HF_ENDPOINT", &place.address), ("HF_TOKEN", "hf_secret")])
}

fn at(commit: &str) -> RemoteVersion {
    RemoteVersion { version: Version::parse(commit).unwrap(), revision: commit.to_owned() }
}

async fn artifact(hub: &Hub) -> Result<Vec<RemoteFile>, SourceError> {
    hub.artifact(&hub.model, &at(COMMIT)).await
}

/// `hello` and a line's end, as a large file.
fn hello() -> RemoteFile {
    RemoteFile {
        path: "model.onnx".into(),
        size: 6,
        digest: Digest::from_hex("sha256", SHA256),
        location: format!("{COMMIT}/onnx/a model.onnx"),
        pin: None,
        likeness: None,
    }
}

async fn read(hub: &Hub, range: Range<u64>) -> Result<String, SourceError> {
    let mut stream = hub.read(&hello(), range).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(String::from_utf8(bytes).unwrap())
}

fn revision(siblings: &str) -> String {
    format!(r#"{{"id": "acme/iris", "sha": "{COMMIT}", "gated": false, "siblings": [{siblings}]}}"#)
}

#[tokio::test]
async fn a_look_is_one_call_that_pins_the_commit() {
    let place = Place::new(|_| answer(200, &[], revision(r#"{"rfilename": "model.onnx"}"#))).await;
    let settings = [("HF_ENDPOINT", format!("{}/hub/", place.address)), ("HF_TOKEN", "hf_secret".to_owned())];
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let look = hub("hf://acme/iris@refs/pr/1", &settings).look().await.unwrap();
    let model = &look.models["iris"];
    assert_eq!(model.versions, [at(COMMIT)]);
    assert_eq!((model.default.as_ref().unwrap().as_str(), model.beside.as_slice()), (COMMIT, &[][..]));
    let path = "/hub/api/models/acme/iris/revision/refs%2Fpr%2F1".to_owned();
    let authorization = Some("Bearer hf_secret".to_owned());
    assert_eq!(place.asked(), [Asked { path, authorization, range: None }]);

    let settings = [("HF_ENDPOINT", place.address.as_str())];
    hub("hf://gpt2", &settings).look().await.unwrap();
    let path = "/api/models/gpt2/revision/main".to_owned();
    assert_eq!(place.asked(), [Asked { path, authorization: None, range: None }]);
}

#[tokio::test]
async fn answers_that_are_none_are_said_to_be() {
    let bodies = [
        (r#"{"sha": "main"}"#.to_owned(), "which is no commit"),
        ("<html>log in</html>".to_owned(), "expected revision 'main' in JSON of 127.0.0.1"),
        (" ".repeat(MAX_ANSWER + 1), "more than 16777216 bytes"),
    ];
    for (body, said) in bodies {
        let place = Place::new(move |_| answer(200, &[], body.clone())).await;
        let error = iris(&place).look().await.unwrap_err();
        assert!(matches!(error, SourceError::Senseless { .. }) && error.to_string().contains(said), "{error}");
    }
    let gone = Place { address: "http://127.0.0.1:1".into(), asked: Arc::default() };
    let error = iris(&gone).look().await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    assert!(
        error.to_string().starts_with("hf://acme/iris does not answer: 127.0.0.1, for revision 'main': "),
        "{error}"
    );
}

/// A page of a commit's tree, and which page comes next.
fn page(asked: &Asked, next: impl Fn(usize) -> Option<String>) -> Answer {
    let number = asked.path.split_once("cursor=").map_or(0, |(_, number)| number.parse().unwrap());
    let nodes = [
        format!(
            r#"{{"type": "directory", "path": "onnx", "oid": "{GIT}", "size": 0}},
                   {{"type": "file", "path": "config.json", "oid": "{GIT}", "size": 6}}"#
        ),
        format!(
            r#"{{"type": "file", "path": "onnx/model.onnx", "oid": "{GIT}", "size": 6, "xetHash": "x",
                    "lfs": {{"oid": "{SHA256}", "size": 6, "pointerSize": 134}}}},
                   {{"type": "file", "path": "model.toml", "oid": "{GIT}", "size": 6}}"#
        ),
    ];
    let link = next(number).map(|link| format!("<https://other/>; rel=\"prev\", <{link}>; rel=\"next\""));
    let headers: Vec<_> = link.as_deref().map(|link| ("link", link)).into_iter().collect();
    answer(200, &headers, format!("[{}]", nodes[number.min(1)]))
}

#[tokio::test]
async fn the_list_of_files_has_pages() {
    let tree = format!("/api/models/acme/iris/tree/{COMMIT}");
    let (relative, revision) = (format!("{tree}?cursor="), revision(r#"{"rfilename": "model.toml"}"#));
    let place = Place::new(move |asked| match asked.path.contains("/revision/") {
        true => answer(200, &[], revision.clone()),
        false => page(asked, |number| (number < 1).then(|| format!("{relative}{}", number + 1))),
    })
    .await;
    let hub = iris(&place);
    let file = |path: &str, from: &str, digest| RemoteFile {
        path: path.into(),
        size: 6,
        digest,
        location: format!("{COMMIT}/{from}"),
        pin: None,
        likeness: None,
    };
    let git = Digest::from_hex("git-sha1", GIT);
    let graph = file("model.onnx", "onnx/model.onnx", Digest::from_hex("sha256", SHA256));
    assert_eq!(artifact(&hub).await.unwrap(), [file("config.json", "config.json", git), graph]);
    let pages = [format!("{tree}?recursive=true&expand=false"), format!("{tree}?cursor=1")];
    assert_eq!(place.paths(), pages);

    // What is known of a commit is not asked again: it stays as it is.
    let look = hub.look().await.unwrap();
    assert_eq!(look.models["iris"].beside, [file("model.toml", "model.toml", git)]);
    assert_eq!(place.paths(), ["/api/models/acme/iris/revision/main"]);
}

#[tokio::test]
async fn pages_are_at_the_hub_and_have_an_end() {
    let place = Place::new(|asked| page(asked, |_| Some("http://elsewhere/?cursor=1".into()))).await;
    let error = artifact(&iris(&place)).await.unwrap_err();
    assert!(error.to_string().contains("the next page of the list of files is at another host"), "{error}");
    let place = Place::new(|asked| page(asked, |_| Some("?cursor=1".into()))).await;
    let error = artifact(&iris(&place)).await.unwrap_err();
    assert!(error.to_string().contains("more than 100 pages"), "{error}");
    assert_eq!(place.asked().len(), MAX_PAGES);
}

#[tokio::test]
async fn a_repository_without_a_model_says_what_it_has() {
    let tree = format!(r#"[{{"type": "file", "path": "pytorch_model.bin", "oid": "{GIT}", "size": 6}}]"#);
    let place = Place::new(move |_| answer(200, &[], tree.clone())).await;
    let error = artifact(&iris(&place)).await.unwrap_err().to_string();
    let said = "a file *.onnx or *.safetensors (there is pytorch_model.bin) is not at hf://acme/iris";
    assert_eq!(error, format!("{said} ({COMMIT})"));
}

/// `range` of `hello` and a line's end.
fn part(asked: &Asked) -> Answer {
    let range = asked.range.clone().unwrap();
    let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
    let range = format!("bytes {start}-{end}/6");
    answer(206, &[("content-range", &range), ("x-repo-commit", COMMIT)], &b"hello\n"[start..=end])
}

#[tokio::test]
async fn a_token_is_told_to_the_hub_alone() {
    let store = Place::new(part).await;
    let signed = format!("{}/blob?signature=x", store.address);
    let place = Place::new(move |asked| match asked.path.starts_with("/acme/") {
        // As a repository that was renamed answers.
        true => answer(307, &[("location", &asked.path.replace("/acme/", "/new/"))], ""),
        false => answer(302, &[("location", &signed), ("x-repo-commit", COMMIT)], ""),
    })
    .await;
    assert_eq!(read(&iris(&place), 1..4).await.unwrap(), "ell");
    let asked = |path: String, authorization: Option<&str>| Asked {
        path,
        authorization: authorization.map(ToOwned::to_owned),
        range: Some("bytes=1-3".into()),
    };
    let token = Some("Bearer hf_secret");
    let path = |org: &str| format!("/{org}/iris/resolve/{COMMIT}/onnx/a%20model.onnx");
    assert_eq!(place.asked(), [asked(path("acme"), token), asked(path("new"), token)]);
    assert_eq!(store.asked(), [asked("/blob?signature=x".into(), None)]);

    // Nor is it told again by way of another host.
    let back = Arc::new(Mutex::new(String::new()));
    let home = back.clone();
    let detour = Place::new(move |_| answer(302, &[("location", &home.lock())], "")).await;
    let away = detour.address.clone();
    let place = Place::new(move |asked| match asked.path.contains("resolve") {
        true => answer(302, &[("location", &away), ("x-repo-commit", COMMIT)], ""),
        false => part(asked),
    })
    .await;
    *back.lock() = format!("{}/back", place.address);
    assert_eq!(read(&iris(&place), 0..6).await.unwrap(), "hello\n");
    assert_eq!(place.asked().last().unwrap().authorization, None);
}

#[tokio::test]
async fn the_commit_is_named_somewhere_on_the_way() {
    let place = Place::new(|asked| match asked.path.starts_with("/api/") {
        true => answer(200, &[], "hello\n"),
        false => answer(307, &[("location", "/api/resolve-cache/x"), ("x-repo-commit", COMMIT)], ""),
    })
    .await;
    assert_eq!(read(&iris(&place), 0..6).await.unwrap(), "hello\n");
}

#[tokio::test]
async fn redirects_have_an_end_and_the_hub_speaks_for_itself() {
    let place = Place::new(|asked| answer(302, &[("location", &asked.path)], "")).await;
    let error = read(&iris(&place), 0..6).await.unwrap_err();
    assert!(error.to_string().contains("more than 3 redirects for file 'model.onnx'"), "{error}");
    assert_eq!(place.asked().len(), MAX_REDIRECTS + 1);

    let place = Place::new(|_| answer(302, &[("location", "http://127.0.0.1:1/")], "")).await;
    for error in [iris(&place).look().await.unwrap_err(), artifact(&iris(&place)).await.unwrap_err()] {
        assert!(error.to_string().contains("it sends us to another host"), "{error}");
    }
    for location in ["file:///etc/passwd", "http://", ""] {
        let place = Place::new(move |_| answer(302, &[("location", location), ("x-repo-commit", COMMIT)], "")).await;
        let error = read(&iris(&place), 0..6).await.unwrap_err();
        assert!(matches!(error, SourceError::Senseless { .. }), "{location}: {error}");
    }
}

#[tokio::test]
async fn bytes_are_those_that_were_asked_for() {
    let of = |status: u16, headers: &'static [(&'static str, &'static str)]| async move {
        let place = Place::new(move |_| {
            let mut given = answer(status, headers, "hello\n");
            given.headers.push(("x-repo-commit", COMMIT.into()));
            given
        })
        .await;
        (read(&iris(&place), 0..6).await, read(&iris(&place), 0..3).await)
    };
    let (whole, partial) = of(200, &[]).await;
    assert_eq!(whole.unwrap(), "hello\n");
    assert!(partial.unwrap_err().to_string().contains("expected 206 for a part of file 'model.onnx', got 200"));
    let (shifted, _) = of(206, &[("content-range", "bytes 1-6/7")]).await;
    assert!(shifted.unwrap_err().to_string().contains("expected 'bytes 0-5/…'"));
    let (longer, _) = of(206, &[("content-range", "bytes 0-5/7")]).await;
    assert!(matches!(longer, Err(SourceError::Changed { .. })));
    let (packed, _) = of(200, &[("content-encoding", "gzip")]).await;
    assert!(packed.unwrap_err().to_string().contains("comes as 'gzip'"));

    for (headers, said) in [
        (&[][..], "no X-Repo-Commit for file 'model.onnx'; 127.0.0.1 is not a hub"),
        (&[("x-repo-commit", "main")][..], "file 'model.onnx' changed while it was read"),
    ] {
        let place = Place::new(move |_| answer(200, headers, "hello\n")).await;
        let error = read(&iris(&place), 0..6).await.unwrap_err().to_string();
        assert!(error.ends_with(said), "{error}");
    }
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    type Headers = &'static [(&'static str, &'static str)];
    let refused = |status: u16, headers: Headers| async move {
        let place = Place::new(move |_| answer(status, headers, "")).await;
        iris(&place).look().await.unwrap_err()
    };
    let gated = refused(403, &[("x-error-code", "GatedRepo")]).await;
    assert!(matches!(gated, SourceError::Denied { .. }));
    assert!(gated.to_string().contains("it is gated (403 Forbidden)") && gated.to_string().contains("HF_TOKEN"));
    let wrong = refused(401, &[("x-error-message", "Invalid credentials in Authorization header")]).await;
    assert!(matches!(wrong, SourceError::Denied { .. }));
    assert!(wrong.to_string().contains("Invalid credentials"), "{wrong}");
    for code in ["RepoNotFound", "RevisionNotFound", "EntryNotFound"] {
        let headers: Headers = Box::leak(Box::new([("x-error-code", code)]));
        let error = refused(if code == "RepoNotFound" { 401 } else { 404 }, headers).await;
        assert!(matches!(&error, SourceError::NotFound { what, .. } if what.contains("revision 'main'")), "{error}");
    }
    assert!(matches!(refused(404, &[]).await, SourceError::NotFound { .. }));
    assert!(matches!(refused(503, &[]).await, SourceError::Unavailable { .. }));
    for (wait, seconds) in [("7", Some(7)), ("99999999999999", Some(MAX_PATIENCE)), ("tomorrow", None)] {
        let headers: Headers = Box::leak(Box::new([("retry-after", wait)]));
        let error = refused(429, headers).await;
        assert!(matches!(error, SourceError::Limited { .. }));
        assert_eq!(error.retry_after(), seconds.map(Duration::from_secs));
    }
    for error in [gated, wrong] {
        assert!(!error.to_string().contains("hf_secret"));
    }
}

/// What the Hub's tools leave of `acme/iris`.
fn downloaded(cache: &std::path::Path) {
    let root = cache.join("models--acme--iris");
    let snapshot = root.join("snapshots").join(COMMIT);
    for folder in [&root.join("blobs"), &root.join("refs"), &snapshot] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(root.join("blobs").join(SHA256), "hello\n").unwrap();
    std::fs::write(root.join("refs/main"), COMMIT).unwrap();
    std::os::unix::fs::symlink(format!("../../blobs/{SHA256}"), snapshot.join("model.onnx")).unwrap();
}

#[tokio::test]
async fn what_was_downloaded_is_believed_once() {
    let cache = tempfile::tempdir().unwrap();
    downloaded(cache.path());
    let place = Place::new(part).await;
    let settings = [("HF_ENDPOINT", place.address.as_str()), ("HF_HUB_CACHE", cache.path().to_str().unwrap())];
    let hub = hub("hf://acme/iris", &settings);
    assert_eq!(read(&hub, 0..3).await.unwrap(), "hel");
    assert_eq!(read(&hub, 3..6).await.unwrap(), "lo\n");
    assert!(place.asked().is_empty());
    // Who asks again has found it wrong.
    assert_eq!(read(&hub, 0..3).await.unwrap(), "hel");
    assert_eq!(place.asked().len(), 1);
}

#[tokio::test]
async fn offline_the_downloads_are_all_there_is() {
    let home = tempfile::tempdir().unwrap();
    downloaded(&home.path().join("hub"));
    let place = Place::new(|_| answer(500, &[], "")).await;
    let settings = [
        ("HF_ENDPOINT", place.address.as_str()),
        ("HF_HOME", home.path().to_str().unwrap()),
        ("HF_HUB_OFFLINE", "yes"),
    ];
    let hub = |uri: &str| hub(uri, &settings);
    let iris = hub("hf://acme/iris");
    let version = iris.look().await.unwrap().models["iris"].versions[0].clone();
    assert_eq!(version.version, at(COMMIT).version);
    let name = ModelName::parse("iris").unwrap();
    let files = iris.artifact(&name, &version).await.unwrap();
    assert_eq!((files[0].path.as_str(), files[0].size), ("model.onnx", 6));
    assert_eq!(files[0].digest, Digest::from_hex("sha256", SHA256));
    for _ in 0..2 {
        assert_eq!(read(&iris, 0..6).await.unwrap(), "hello\n");
    }
    let pinned = hub(&format!("hf://acme/iris@{COMMIT}"));
    assert_eq!(pinned.look().await.unwrap(), iris.look().await.unwrap());
    // What is downloaded later of the same commit makes it another.
    let snapshot = home.path().join("hub/models--acme--iris/snapshots").join(COMMIT);
    let blob = std::fs::read_link(snapshot.join("model.onnx")).unwrap();
    std::os::unix::fs::symlink(blob, snapshot.join("more.txt")).unwrap();
    assert!(matches!(iris.artifact(&name, &version).await, Err(SourceError::Changed { .. })));
    assert_ne!(iris.look().await.unwrap().models["iris"].versions[0], version);
    for missing in ["hf://acme/iris@v2", "hf://acme/other"] {
        let error = hub(missing).look().await.unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    }
    assert!(place.asked().is_empty());
}

#[test]
fn the_environment_is_that_of_the_hubs_tools() {
    let caches =
        |settings: &[(&str, &str)]| environment(settings).unwrap().cache.map(|path| path.display().to_string());
    let of = |path: &str| Some(path.to_owned());
    assert_eq!(caches(&[]), None);
    assert_eq!(caches(&[("HOME", "/ada")]), of("/ada/.cache/huggingface/hub"));
    assert_eq!(caches(&[("HOME", "/ada"), ("XDG_CACHE_HOME", "/x")]), of("/x/huggingface/hub"));
    assert_eq!(caches(&[("HOME", "/ada"), ("HF_HOME", "~/hf")]), of("/ada/hf/hub"));
    assert_eq!(caches(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), of("/c"));
    assert_eq!(environment(&[("HF_ENDPOINT", " ")]).unwrap().endpoint.as_str(), "https://huggingface.co/");
    for wrong in ["hub", "ftp://hub", "https://ada:s3cret@hub", "https://hub/?x"] {
        let error = environment(&[("HF_ENDPOINT", wrong)]).err().unwrap().to_string();
        assert!(error.starts_with("HF_ENDPOINT: expected") && !error.contains("s3cret"), "{wrong}: {error}");
    }
    for (set, offline) in [("1", true), ("true", true), ("0", false), ("", false)] {
        assert_eq!(environment(&[("HF_HUB_OFFLINE", set)]).unwrap().offline, offline, "{set}");
    }
}

#[test]
fn a_token_is_the_environments_or_the_files() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().to_str().unwrap();
    let environment = |token| environment(&[("HF_HOME", path), ("HF_TOKEN", token)]).unwrap();
    let told = |environment: &Environment| environment.authorization().map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(told(&environment("")), None);
    std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
    let from_file = environment("");
    assert_eq!(told(&from_file).unwrap(), "Bearer hf_file");
    assert_eq!(told(&environment("hf_environment\n")).unwrap(), "Bearer hf_environment");
    std::fs::write(home.path().join("token"), "hf_newer\n").unwrap();
    assert_eq!(told(&from_file).unwrap(), "Bearer hf_newer");
    assert!(!format!("{:?}", from_file.authorization()).contains("hf_newer"));
}

#[test]
fn a_repository_has_a_name_and_a_revision() {
    let of = |uri: &str| {
        let hub = hub(uri, &[]);
        (hub.id, hub.model.to_string(), hub.revision)
    };
    let text = |parts: [&str; 3]| (parts[0].to_owned(), parts[1].to_owned(), parts[2].to_owned());
    assert_eq!(of("hf://acme/iris"), text(["acme/iris", "iris", "main"]));
    assert_eq!(of("hf://acme/iris-v1.5@refs/pr/1"), text(["acme/iris-v1.5", "iris-v1.5", "refs/pr/1"]));
    assert_eq!(of("hf://acme/iris@refs%2Fpr%2F1"), text(["acme/iris", "iris", "refs/pr/1"]));
    assert_eq!(of("hf://gpt2"), text(["gpt2", "gpt2", "main"]));
    assert_eq!(of("hf://gpt2@v1/x"), text(["gpt2", "gpt2", "v1/x"]));
    let bad = ["hf://a/b/c", "hf://a/..", "hf://a/b%2Fc", "hf://a/b@", "hf://a/b@..", "hf://a/b@x/../y", "hf://a/%FF"];
    for uri in bad {
        let error = Hub::with(&SourceUri::parse(uri).unwrap(), environment(&[]).unwrap()).err().unwrap().to_string();
        assert!(error.starts_with(&format!("source '{uri}': ")), "{uri}: {error}");
    }
    assert!(Hub::with(&SourceUri::parse("s3://a/b").unwrap(), environment(&[]).unwrap()).is_err());
}

#[test]
fn the_next_page_is_found_among_links() {
    assert_eq!(next_page("<https://h/a?x=1,2>; rel=\"next\""), Some("https://h/a?x=1,2"));
    assert_eq!(next_page("<a>; rel=\"prev\", <b>; title=x; rel=next"), Some("b"));
    assert_eq!(next_page("<a>; rel=\"prev\""), None);
    assert_eq!(next_page("nonsense"), None);
}

#[tokio::test]
async fn what_the_hub_says_of_a_commit_is_its_lineage() {
    let about = format!(r#"{{"sha": "{COMMIT}", "author": "acme", "tags": ["license:mit"]}}"#);
    let place = Place::new(move |_| answer(200, &[], about.clone())).await;
    let iris = iris(&place);
    let found = iris.lineage(&iris.model, &at(COMMIT)).await.unwrap().unwrap();
    assert_eq!(place.paths(), [format!("/api/models/acme/iris/revision/{COMMIT}")]);
    assert_eq!((found.aliases, found.author.as_deref()), (vec!["main".to_owned()], Some("acme")));
    assert_eq!((found.tags["license"].as_str(), found.git_commit.as_deref()), ("mit", Some(COMMIT)));
    let shown = &iris.look().await.unwrap().models["iris"];
    let names = iris.names(&iris.model, shown).await.unwrap().unwrap();
    assert_eq!(names.aliases, [("main".to_owned(), COMMIT.to_owned())].into());
    let pinned = hub(&format!("hf://acme/iris@{COMMIT}"), &[("HF_ENDPOINT", &place.address)]);
    assert_eq!(pinned.names(&iris.model, shown).await, Ok(None));
    assert!(pinned.lineage(&iris.model, &at(COMMIT)).await.unwrap().unwrap().aliases.is_empty());
    place.asked();
    let offline = hub("hf://acme/iris", &[("HF_ENDPOINT", &place.address), ("HF_HUB_OFFLINE", "1")]);
    let found = offline.lineage(&iris.model, &at(COMMIT)).await.unwrap().unwrap();
    assert_eq!((found.version.as_deref(), place.asked()), (Some(COMMIT), vec![]));
}
