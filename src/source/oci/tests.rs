use std::{
    io::Read,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use flate2::{Compression, bufread::GzEncoder};
use serde_json::{Value, json};

use super::{tar::tests as tar, *};

/// What a registry holds, how it answers, and what it was asked.
#[derive(Default)]
struct Shelf {
    manifests: BTreeMap<String, Vec<u8>>,
    blobs: BTreeMap<String, Vec<u8>>,
    /// The header that a request must have, and the challenge of one that has not.
    wants: Option<(String, String)>,
    /// What is said to who asks for a token with this header.
    token: Option<(String, Value)>,
    /// Where blobs are instead.
    elsewhere: Option<String>,
    knows_ranges: bool,
    asked: Vec<(Method, String, HeaderMap)>,
}

type Shelves = Arc<Mutex<Shelf>>;

fn digest(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

impl Shelf {
    fn blob(&mut self, media_type: &str, bytes: &[u8], annotations: Value) -> Value {
        self.blobs.insert(digest(bytes), bytes.to_vec());
        json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len(), "annotations": annotations})
    }

    fn tag(&mut self, tag: &str, manifest: &Value) -> String {
        let bytes = manifest.to_string().into_bytes();
        let digest = digest(&bytes);
        self.manifests.insert(tag.to_owned(), bytes.clone());
        self.manifests.insert(digest.clone(), bytes);
        digest
    }

    /// An image with these layers.
    fn image(&mut self, layers: &[Vec<u8>]) -> String {
        let layers: Vec<Value> = layers
            .iter()
            .map(|tar| self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(tar), Value::Null))
            .collect();
        let config = self.blob("application/vnd.oci.image.config.v1+json", b"{}", Value::Null);
        self.tag("v1", &json!({"config": config, "layers": layers}))
    }

    fn answer(&mut self, method: &Method, path: &str, headers: &HeaderMap) -> Response {
        self.asked.push((method.clone(), path.to_owned(), headers.clone()));
        let authorization =
            headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if let Some((_, query)) = path.split_once("/token?") {
            let (login, token) = self.token.as_ref().unwrap();
            assert!(query.contains("scope=repository%3Ateam%2Firis%3Apull"), "{query}");
            return match authorization == login {
                true => token.to_string().into_response(),
                false => StatusCode::UNAUTHORIZED.into_response(),
            };
        }
        if let Some((wanted, challenge)) = &self.wants
            && wanted != authorization
        {
            return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge.clone())]).into_response();
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        if path.starts_with("/v2/team/iris/manifests/") {
            return match self.manifests.get(name) {
                Some(bytes) => ([("docker-content-digest", digest(bytes))], bytes.clone()).into_response(),
                None => (StatusCode::NOT_FOUND, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#).into_response(),
            };
        }
        if let Some(elsewhere) = &self.elsewhere {
            return (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("{elsewhere}/{name}"))])
                .into_response();
        }
        let Some(bytes) = self.blobs.get(name) else { return StatusCode::NOT_FOUND.into_response() };
        match headers.get(header::RANGE).and_then(|range| range.to_str().ok()).filter(|_| self.knows_ranges) {
            Some(range) => {
                let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
                let content = format!("bytes {start}-{end}/{}", bytes.len());
                let body = Body::from(bytes[start..=end].to_vec());
                (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, content)], body).into_response()
            }
            None => bytes.clone().into_response(),
        }
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    GzEncoder::new(bytes, Compression::fast()).read_to_end(&mut packed).unwrap();
    packed
}

/// A registry on a port of its own, as long as the test's runtime.
async fn registry(shelf: Shelf) -> (SocketAddr, Shelves) {
    let shelves = Arc::new(Mutex::new(shelf));
    let ours = shelves.clone();
    let answer = move |request: Request| {
        let path = request.uri().path_and_query().unwrap().to_string();
        let response = ours.lock().answer(request.method(), &path, request.headers());
        async move { response }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    (address, shelves)
}

/// A source in a scratch folder that ends with it.
struct Opened {
    source: Artifact,
    scratch: TempDir,
}

impl Opened {
    fn new(uri: &str, max_bytes: u64, settings: Option<&Path>) -> Result<Self, SourceError> {
        let scratch = tempfile::tempdir().unwrap();
        let connections = Arc::new(crate::source::cache::Connections::new(8));
        let place = Scratch { folder: scratch.path().to_path_buf(), max_bytes, connections };
        let source = Artifact::with_settings(&SourceUri::parse(uri)?, place, settings.map(Path::to_path_buf))?;
        Ok(Self { source, scratch })
    }

    fn at(address: SocketAddr) -> Self {
        Self::new(&format!("oci://{address}/team/iris:v1"), 1 << 20, None).unwrap()
    }

    async fn files(&self) -> Result<Vec<RemoteFile>, SourceError> {
        let look = self.source.look().await?;
        let (name, model) = look.models.first_key_value().unwrap();
        self.source.artifact(name, &model.versions[0]).await
    }

    /// Every file, as `path: content`.
    async fn contents(&self) -> Result<Vec<String>, SourceError> {
        let mut contents = Vec::new();
        for file in self.files().await? {
            let content = self.content(&file, 0..file.size).await?;
            assert_eq!(Some(Digest::of(content.as_bytes())), file.digest);
            contents.push(format!("{}: {content}", file.path));
        }
        Ok(contents)
    }

    async fn content(&self, file: &RemoteFile, range: Range<u64>) -> Result<String, SourceError> {
        let mut stream = self.source.read(file, range).await?;
        let mut content = Vec::new();
        while let Some(piece) = stream.next().await {
            content.extend_from_slice(&piece?);
        }
        Ok(String::from_utf8(content).unwrap())
    }

    fn leftovers(&self) -> usize {
        std::fs::read_dir(self.scratch.path()).unwrap().count()
    }
}

fn raw(shelf: &mut Shelf) -> String {
    let path = |path: &str| json!({"org.cncf.model.filepath": path});
    let graph = shelf.blob("application/vnd.cncf.model.weight.v1.raw", b"graph", path("iris.onnx"));
    let config = shelf.blob("application/vnd.cncf.model.config.v1+json", b"{}", Value::Null);
    shelf.tag("v1", &json!({"config": config, "layers": [graph]}))
}

#[tokio::test]
async fn a_tag_is_a_version_by_its_digest_and_a_moved_one_another() {
    let mut shelf = Shelf { knows_ranges: true, ..Shelf::default() };
    let first = raw(&mut shelf);
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::at(address);
    let look = opened.source.look().await.unwrap();
    let model = &look.models["iris"];
    assert_eq!(model.versions[0].revision, first);
    assert_eq!(model.versions[0].version.as_str(), &first["sha256:".len()..][..12]);
    assert_eq!(model.default.as_ref(), Some(&model.versions[0].version));
    assert_eq!(shelves.lock().asked.len(), 1, "one call looks");
    assert_eq!(shelves.lock().asked[0].0, Method::HEAD);

    let files = opened.files().await.unwrap();
    assert_eq!(files[0].path, "model.onnx");
    assert_eq!(opened.content(&files[0], 1..4).await.unwrap(), "rap");
    shelves.lock().knows_ranges = false;
    assert_eq!(opened.content(&files[0], 1..4).await.unwrap(), "rap", "a registry need not know ranges");

    let config = shelves.lock().blob("application/vnd.oci.image.config.v1+json", b"{}", Value::Null);
    let second = shelves.lock().tag("v1", &json!({"config": config, "layers": []}));
    assert_eq!(opened.source.look().await.unwrap().models["iris"].versions[0].revision, second);
    let error = opened.files().await.unwrap_err().to_string();
    assert!(error.contains("the image has nothing in /models"), "{error}");

    shelves.lock().manifests.clear();
    let error = opened.source.look().await.unwrap_err();
    assert_eq!(error.to_string(), format!("'v1' is not at oci://{address}/team/iris:v1"));
}

#[tokio::test]
async fn a_digest_is_followed_by_itself_and_verified() {
    let mut shelf = Shelf::default();
    let revision = raw(&mut shelf);
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::new(&format!("oci://{address}/team/iris:ignored@{revision}"), 1 << 20, None).unwrap();
    assert_eq!(opened.contents().await.unwrap(), ["model.onnx: graph"]);
    shelves.lock().manifests.insert(revision, b"{}".to_vec());
    let version = RemoteVersion { version: Version::parse("1").unwrap(), revision: opened.source.reference.clone() };
    let error = opened.source.artifact(&ModelName::parse("iris").unwrap(), &version).await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
    let error = opened.source.look().await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn an_index_leads_to_a_digest() {
    let mut shelf = Shelf::default();
    let revision = raw(&mut shelf);
    let leads_to = |digest: &str| json!({"manifests": [{"mediaType": "m", "digest": digest, "size": 1}]});
    let index = shelf.tag("index", &leads_to(&revision));
    let inner = shelf.tag("inner", &leads_to(&index));
    let tag = shelf.tag("tag", &leads_to("v1"));
    let (address, _) = registry(shelf).await;
    let opened = Opened::at(address);
    let files = async |revision: String| {
        let version = RemoteVersion { version: Version::parse("1").unwrap(), revision };
        opened.source.artifact(&ModelName::parse("iris").unwrap(), &version).await
    };
    assert_eq!(files(index).await.unwrap()[0].path, "model.onnx");
    assert!(files(inner).await.unwrap_err().to_string().contains("leads to another index"));
    assert!(files(tag).await.unwrap_err().to_string().contains("has the digest 'v1'; expected sha256:"));
}

#[tokio::test]
async fn a_token_is_asked_for_once_and_anew_when_it_has_ended() {
    let mut shelf = Shelf::default();
    raw(&mut shelf);
    let (address, shelves) = registry(shelf).await;
    let challenge = format!("Bearer realm=\"http://{address}/token\",service=\"shelf\"");
    shelves.lock().wants = Some(("Bearer first".to_owned(), challenge.clone()));
    // ada:s3cr@t
    shelves.lock().token = Some((
        "Basic YWRhOnMzY3JAdA==".to_owned(),
        json!({"token": "first", "access_token": "first", "expires_in": 300}),
    ));
    let opened = Opened::new(&format!("oci://ada:s3cr%40t@{address}/team/iris:v1"), 1 << 20, None).unwrap();
    assert_eq!(opened.contents().await.unwrap(), ["model.onnx: graph"]);
    let asked = |path: &str| shelves.lock().asked.iter().filter(|(_, asked, _)| asked.contains(path)).count();
    assert_eq!(asked("/token?service=shelf"), 1);

    shelves.lock().wants = Some(("Bearer second".to_owned(), challenge));
    shelves.lock().token.as_mut().unwrap().1 = json!({"access_token": "second"});
    assert_eq!(opened.contents().await.unwrap(), ["model.onnx: graph"]);
    assert_eq!(asked("/token?service=shelf"), 2);

    shelves.lock().token.as_mut().unwrap().0 = "another".to_owned();
    shelves.lock().wants.as_mut().unwrap().0 = "Bearer third".to_owned();
    let error = opened.source.look().await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }) && !error.to_string().contains("s3cr"), "{error}");
}

#[tokio::test]
async fn a_login_comes_from_the_settings_of_docker() {
    let mut shelf = Shelf::default();
    raw(&mut shelf);
    shelf.wants = Some(("Basic YWRhOnMzY3JAdA==".to_owned(), "Basic realm=\"shelf\"".to_owned()));
    let (address, _) = registry(shelf).await;
    let folder = tempfile::tempdir().unwrap();
    let settings = folder.path().join("config.json");
    let opened = Opened::new(&format!("oci://{address}/team/iris:v1"), 1 << 20, Some(&settings)).unwrap();
    let error = opened.source.look().await.unwrap_err().to_string();
    assert!(error.contains("it wants a login, and there is none"), "{error}");
    for login in [
        json!({"auths": {address.to_string(): {"auth": "YWRhOnMzY3JAdA=="}, "elsewhere": {"auth": "eA=="}}}),
        json!({"auths": {format!("https://{address}/v1/"): {"username": "ada", "password": "s3cr@t"}}}),
    ] {
        std::fs::write(&settings, login.to_string()).unwrap();
        assert_eq!(opened.contents().await.unwrap(), ["model.onnx: graph"]);
    }
    // The settings are read when the registry asks.
    let opened = Opened::new(&format!("oci://{address}/team/iris:v1"), 1 << 20, Some(&settings)).unwrap();
    std::fs::write(&settings, "{\"auths\": s3cret}").unwrap();
    let error = opened.source.look().await.unwrap_err().to_string();
    assert!(error.contains("config.json cannot be read: line 1") && !error.contains("s3c"), "{error}");
}

#[tokio::test]
async fn storage_elsewhere_does_not_see_the_login() {
    let mut shelf = Shelf::default();
    raw(&mut shelf);
    shelf.wants = Some(("Basic YWRhOg==".to_owned(), "Basic".to_owned()));
    let storage = Shelf { blobs: shelf.blobs.clone(), knows_ranges: true, ..Shelf::default() };
    let (storage, seen) = registry(storage).await;
    shelf.elsewhere = Some(format!("http://{storage}"));
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::new(&format!("oci://ada@{address}/team/iris:v1"), 1 << 20, None).unwrap();
    assert_eq!(opened.contents().await.unwrap(), ["model.onnx: graph"]);
    assert!(seen.lock().asked.iter().all(|(_, _, headers)| !headers.contains_key(header::AUTHORIZATION)));
    assert_eq!(seen.lock().asked[0].2[header::RANGE], "bytes=0-4");

    for (wrong, said) in [("http://[", "to where we do not go"), ("ftp://a", "to where we do not go")] {
        shelves.lock().elsewhere = Some(wrong.to_owned());
        let error = opened.contents().await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    shelves.lock().elsewhere = Some(format!("http://{address}/v2/again"));
    let error = opened.contents().await.unwrap_err().to_string();
    assert!(error.contains("more than 5 times"), "{error}");
}

#[tokio::test]
async fn an_image_s_layers_lie_over_each_other() {
    let mut shelf = Shelf::default();
    let below = [
        tar::member("models", b'5', b""),
        tar::member("bin", b'2', b""),
        tar::file("etc/passwd", b"root"),
        tar::file("models/iris/1/model.onnx", b"old graph"),
        tar::file("models/iris/1/gone", b""),
        tar::file("models/iris/1/data/a", b"a"),
        tar::file("models/iris/1/was/a/folder", b""),
        tar::file("models/iris/1/turned", b""),
        tar::member("models/iris/1/link", b'2', b""),
        vec![0; 1024],
    ];
    let above = [
        tar::file("./models/iris/1/model.onnx", b"graph"),
        tar::file("models/iris/1/.wh.gone", b""),
        tar::file("models/iris/1/.wh.link", b""),
        tar::file("models/iris/1/data/b", b"b"),
        tar::file("models/iris/1/data/.wh..wh..opq", b""),
        tar::file("models/iris/1/was", b"file"),
        tar::file("models/iris/1/turned/into", b"folder"),
        tar::file("tmp/.wh.models", b""),
    ];
    shelf.image(&[below.concat(), above.concat()]);
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::at(address);
    let expected = ["data/b: b", "model.onnx: graph", "turned/into: folder", "was: file"];
    assert_eq!(opened.contents().await.unwrap(), expected);
    assert_eq!(opened.leftovers(), 1);
    // Another try finds it unpacked, until it is over.
    let asked = || shelves.lock().asked.iter().filter(|(_, asked, _)| asked.contains("/blobs/")).count();
    let before = asked();
    assert_eq!(opened.contents().await.unwrap(), expected);
    assert_eq!((opened.leftovers(), asked()), (1, before));
    let version = opened.source.look().await.unwrap().models.into_values().next().unwrap().versions.remove(0);
    opened.source.done(&RemoteVersion { revision: "other".into(), ..version.clone() });
    assert_eq!(opened.leftovers(), 1);
    opened.source.done(&version);
    assert_eq!(opened.leftovers(), 0);
    let progress = opened.source.preparing().unwrap();
    assert_eq!(opened.contents().await.unwrap(), expected);
    let [total, fetched] = [&progress.total, &progress.fetched].map(|count| count.load(Ordering::Relaxed));
    assert!(total > 0 && fetched == total && asked() == before + 2, "{fetched} of {total}");

    let newest = tar::file(".wh.models", b"");
    shelves.lock().image(&[below.concat(), newest]);
    let error = opened.contents().await.unwrap_err().to_string();
    assert!(error.contains("nothing in /models"), "{error}");
    assert_eq!(opened.leftovers(), 0);
}

#[tokio::test]
async fn folders_and_files_come_packed_and_plain() {
    let mut shelf = Shelf::default();
    // By `zstd` of a tar file; made by hand of raw blocks: a frame with the content in it, and one to be passed over.
    let archive = tar::file("docs/a.txt", b"text");
    let mut zstd = b"\x50\x2a\x4d\x18\x02\0\0\0xx\x28\xb5\x2f\xfd\xa0".to_vec();
    zstd.extend(u32::try_from(archive.len()).unwrap().to_le_bytes());
    zstd.extend(&(u32::try_from(archive.len()).unwrap() << 3 | 1).to_le_bytes()[..3]);
    zstd.extend(&archive);
    let title = |title: &str| json!({"org.opencontainers.image.title": title});
    let unpack = json!({"org.opencontainers.image.title": "bert/data", "io.deis.oras.content.unpack": "true"});
    let layers = [
        shelf.blob("application/octet-stream", b"graph", title("bert/model.onnx")),
        shelf.blob("any", &gzip(&tar::file("bert/data/b", b"b")), unpack.clone()),
        shelf.blob("any", &gzip(&tar::file("data/c", b"c")), unpack),
        shelf.blob("application/vnd.cncf.model.doc.v1.tar+zstd", &zstd, Value::Null),
        shelf.blob("application/vnd.cncf.model.weight.v1.tar", &tar::file("bert/a", b"a"), Value::Null),
        shelf.blob("application/octet-stream", b"import os", title("bert/train.py")),
        shelf.blob("application/octet-stream", b"", title("bert/empty")),
    ];
    shelf.tag("v1", &json!({"layers": layers}));
    let (address, _) = registry(shelf).await;
    let opened = Opened::at(address);
    let expected = ["model.onnx: graph", "data/b: b", "data/c: c", "docs/a.txt: text", "a: a"];
    let files = opened.files().await.unwrap();
    assert_eq!(files.last().map(|file| (file.path.as_str(), file.size)), Some(("empty", 0)));
    assert_eq!(opened.contents().await.unwrap()[..5], expected);
}

#[tokio::test]
async fn archives_that_do_harm_are_refused() {
    let bomb = tar::file("models/zeros", &vec![0; 2 << 20]);
    let cases: [(Vec<u8>, &str); 5] = [
        (bomb, "unpacked it is larger than the cache may be"),
        (tar::file("models/../../etc/cron.d/x", b""), "leaves the folder"),
        (tar::member("models/model.onnx", b'2', b""), "'model.onnx' is refused: in its archive it is a symbolic"),
        (tar::member("models", b'1', b""), "'models' is refused: in its archive it is a hard link"),
        (b"not an archive, whatever else".repeat(50), "cannot be unpacked"),
    ];
    for (archive, said) in cases {
        let mut shelf = Shelf::default();
        shelf.image(&[archive]);
        let (address, _) = registry(shelf).await;
        let opened = Opened::at(address);
        let error = opened.contents().await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, SourceError::Refused { .. }) && text.contains(said), "{said}: {text}");
        assert_eq!(opened.leftovers(), 0);
    }
    // As some programs that build images write it.
    let mut shelf = Shelf::default();
    shelf.image(&[tar::file("/models/model.onnx", b"graph")]);
    let (address, _) = registry(shelf).await;
    assert_eq!(Opened::at(address).contents().await.unwrap(), ["model.onnx: graph"]);
}

#[tokio::test]
async fn an_archive_that_is_another_is_not_even_opened() {
    let mut shelf = Shelf::default();
    shelf.image(&[tar::file("models/model.onnx", b"graph")]);
    for bytes in shelf.blobs.values_mut() {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
    }
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::at(address);
    let error = opened.contents().await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
    shelves.lock().blobs.values_mut().for_each(|bytes| bytes.extend(b"more"));
    let error = opened.contents().await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
    shelves.lock().blobs.values_mut().for_each(|bytes| bytes.truncate(9));
    let error = opened.contents().await.unwrap_err().to_string();
    assert!(error.contains("it ends after 9 of"), "{error}");
}

#[tokio::test]
async fn answers_that_are_none_are_told_apart() {
    let statuses = [
        (StatusCode::TOO_MANY_REQUESTS, "wants fewer calls: 429"),
        (StatusCode::FORBIDDEN, "refuses: 403"),
        (StatusCode::BAD_GATEWAY, "does not answer: 502"),
        (StatusCode::NOT_FOUND, "'v1' is not at"),
        (StatusCode::BAD_REQUEST, "answers what makes no sense: 400"),
    ];
    let next = Arc::new(AtomicUsize::new(0));
    let answer = {
        let next = next.clone();
        move || async move { (statuses[next.load(Ordering::Relaxed)].0, [(header::RETRY_AFTER, "7")]) }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let opened = Opened::at(listener.local_addr().unwrap());
    let serving = tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    for (_, said) in statuses {
        let error = opened.source.look().await.unwrap_err();
        assert!(error.to_string().contains(said), "{said}: {error}");
        if let SourceError::Limited { retry_after, .. } = error {
            assert_eq!(retry_after, Some(Duration::from_secs(7)));
        }
        next.fetch_add(1, Ordering::Relaxed);
    }
    serving.abort();
    let _ = serving.await;
    let error = opened.source.look().await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
}

#[test]
fn a_uri_names_a_repository_and_a_tag_or_digest() {
    assert_eq!(reference("team/iris"), Ok(("team/iris", "latest".to_owned())));
    assert_eq!(reference("team/iris:v3"), Ok(("team/iris", "v3".to_owned())));
    let digest = format!("sha256:{}", "0a".repeat(32));
    assert_eq!(reference(&format!("iris:v3@{digest}")), Ok(("iris", digest)));
    for wrong in ["", ":v1", "Iris", "a//b", "-a", "a:", "a:b/c", "a:-b", "a@sha256:12", "a@md5:00", "../a", "a/.."] {
        assert!(reference(wrong).is_err(), "{wrong}");
    }
    let error = Opened::new("oci://host", 1, None).err().unwrap().to_string();
    assert!(error.contains("expected oci://registry/repository:tag"), "{error}");
}

#[test]
fn encryption_is_for_what_leaves_this_machine() {
    for here in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "127.8.9.1"] {
        assert!(is_this_machine(here), "{here}");
    }
    for away in ["localhost.example", "10.0.0.1", "registry:5000", "[fd00::1]", "127.0.0.1.example:80"] {
        assert!(!is_this_machine(away), "{away}");
    }
}

#[tokio::test]
async fn annotations_and_settings_are_the_lineage() {
    let mut shelf = Shelf::default();
    let graph =
        shelf.blob("application/vnd.cncf.model.weight.v1.raw", b"g", json!({"org.cncf.model.filepath": "a.onnx"}));
    let card =
        shelf.blob("application/vnd.cncf.model.doc.v1.raw", b"# a", json!({"org.cncf.model.filepath": "README.md"}));
    let settings = json!({"descriptor": {"family": "forest", "version": "3"}}).to_string();
    let config = shelf.blob("application/vnd.cncf.model.config.v1+json", settings.as_bytes(), Value::Null);
    let annotations = json!({"org.opencontainers.image.revision": "c0ffee"});
    let digest = shelf.tag("model", &json!({"config": config, "layers": [graph, card], "annotations": annotations}));
    let chosen = json!({
        "mediaType": "m", "digest": digest, "size": 1, "annotations": {"com.acme.team": "flowers"},
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
    });
    let annotations = json!({"org.opencontainers.image.revision": "other", "org.opencontainers.image.authors": "ada"});
    shelf.tag("v1", &json!({"manifests": [chosen], "annotations": annotations}));
    let (address, shelves) = registry(shelf).await;
    let opened = Opened::at(address);
    let look = opened.source.look().await.unwrap();
    let (name, model) = look.models.first_key_value().unwrap();
    let lineage = async || opened.source.lineage(name, &model.versions[0]).await.unwrap().unwrap();
    let found = lineage().await;
    assert_eq!((found.version.as_deref(), found.git_commit.as_deref()), (Some("3"), Some("c0ffee")));
    assert_eq!((found.author.as_deref(), found.aliases), (Some("ada"), vec!["v1".to_owned()]));
    assert_eq!((found.tags["family"].as_str(), found.tags["com.acme.team"].as_str()), ("forest", "flowers"));
    let names = opened.source.names(name, model).await.unwrap().unwrap();
    assert_eq!(names.aliases["v1"], model.versions[0].version.as_str());
    let paths: Vec<String> = opened.files().await.unwrap().into_iter().map(|file| file.path).collect();
    assert_eq!(paths, ["model.onnx", "README.md"]);

    // Settings that are others say nothing.
    let digest = Digest::of(settings.as_bytes()).to_string();
    shelves.lock().blobs.insert(digest.clone(), settings.replace('3', "4").into_bytes());
    assert_eq!(lineage().await.version, None);
    shelves.lock().blobs.remove(&digest);
    assert_eq!(lineage().await.git_commit.as_deref(), Some("c0ffee"));
}
