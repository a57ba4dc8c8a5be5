use std::fs;

use super::*;

/// A checkout in a folder of its own.
struct Checkout(tempfile::TempDir);

impl Checkout {
    fn new(config: &str) -> Self {
        let checkout = Self(tempfile::tempdir().unwrap());
        checkout.write(".dvc/config", config.as_bytes());
        checkout
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Puts a content into a store, and returns its MD5.
    fn store(&self, store: &str, content: &[u8], ending: &str) -> String {
        let md5 = md5(content);
        self.write(&format!("{store}/{}/{}{ending}", &md5[..2], &md5[2..]), content);
        md5 + ending
    }

    fn open(&self, file: &str) -> Tracked {
        let uri = format!("dvc://{}#{file}", self.0.path().display());
        Tracked::open(&SourceUri::parse(&uri).unwrap()).unwrap()
    }
}

/// By `md5sum`, of the few contents that are used here.
fn md5(content: &[u8]) -> String {
    let known = ["d41d8cd98f00b204e9800998ecf8427e"].into_iter().map(ToOwned::to_owned);
    // A hasher tells what it found when something else was announced.
    let mut hasher = Hasher::new(Digest::from_hex("md5", &"0".repeat(32)), 0);
    hasher.update(content);
    let said = hasher.finish("").unwrap_err().to_string();
    let md5 = said.rsplit("md5:").next().unwrap().to_owned();
    assert!(!content.is_empty() || known.clone().any(|known| known == md5));
    md5
}

async fn files(source: &Tracked) -> Result<Vec<RemoteFile>, SourceError> {
    let look = source.look().await?;
    let (name, model) = look.models.first_key_value().unwrap();
    source.artifact(name, &model.versions[0]).await
}

async fn contents(source: &Tracked) -> Result<Vec<String>, SourceError> {
    let mut contents = Vec::new();
    for file in files(source).await? {
        let mut stream = source.read(&file, 0..file.size).await?;
        let mut content = format!("{}: ", file.path);
        while let Some(piece) = stream.next().await {
            content += std::str::from_utf8(&piece?).unwrap();
        }
        contents.push(content);
    }
    Ok(contents)
}

const CONFIG: &str = "[core]\nremote = store\n['remote \"store\"']\nurl = ../remote\n";

#[tokio::test]
async fn a_file_comes_from_the_cache_or_the_remote() {
    for store in [".dvc/cache/files/md5", "remote/files/md5"] {
        let checkout = Checkout::new(CONFIG);
        let md5 = checkout.store(store, b"graph", "");
        checkout.write("sub/iris.onnx.dvc", format!("outs: [{{md5: {md5}, hash: md5, path: iris.onnx}}]").as_bytes());
        let source = checkout.open("sub/iris.onnx.dvc");
        let look = source.look().await.unwrap();
        let model = &look.models["iris"];
        assert_eq!((model.versions[0].version.as_str(), &model.versions[0].revision), (&md5[..12], &md5));
        assert_eq!(model.default.as_ref(), Some(&model.versions[0].version));
        assert_eq!(contents(&source).await.unwrap(), ["model.onnx: graph"]);
        assert_eq!(files(&source).await.unwrap()[0].digest, Some(Digest::parse(&format!("md5:{md5}")).unwrap()));
    }
}

#[tokio::test]
async fn a_folder_is_its_list() {
    let checkout = Checkout::new(CONFIG);
    let graph = checkout.store("remote/files/md5", b"graph", "");
    let labels = checkout.store(".dvc/cache/files/md5", b"a b", "");
    let list =
        format!(r#"[{{"md5": "{graph}", "relpath": "1/model.onnx"}}, {{"md5": "{labels}", "relpath": "labels.txt"}}]"#);
    let md5 = checkout.store("remote/files/md5", list.as_bytes(), ".dir");
    checkout.write("iris.dvc", format!("outs: [{{md5: {md5}, hash: md5, path: iris}}]").as_bytes());
    let source = checkout.open("iris.dvc");
    assert_eq!(contents(&source).await.unwrap(), ["model.onnx: graph", "labels.txt: a b"]);

    let path = format!("remote/files/md5/{}/{}", &md5[..2], &md5[2..]);
    checkout.write(&path, list.replace("labels.txt", "labels.TXT").as_bytes());
    let error = contents(&source).await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn what_older_programs_have_added_is_not_verified() {
    let checkout = Checkout::new(CONFIG);
    let md5 = checkout.store("remote", b"graph", "");
    checkout.write("iris.onnx.dvc", format!("outs: [{{md5: {md5}, path: iris.onnx}}]").as_bytes());
    let source = checkout.open("iris.onnx.dvc");
    assert_eq!(contents(&source).await.unwrap(), ["model.onnx: graph"]);
    assert_eq!(files(&source).await.unwrap()[0].digest, None);
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let checkout = Checkout::new(CONFIG);
    let source = checkout.open("iris.onnx.dvc");
    let error = source.look().await.unwrap_err().to_string();
    assert!(error.starts_with("'iris.onnx.dvc' is not at "), "{error}");

    let md5 = "d921513cf1669fcd2448587857dad7a9";
    checkout.write("iris.onnx.dvc", format!("outs: [{{md5: {md5}, hash: md5, path: iris.onnx}}]").as_bytes());
    let error = files(&source).await.unwrap_err().to_string();
    assert!(error.starts_with("'files/md5/d9/21513cf1669fcd2448587857dad7a9' is not at "), "{error}");

    checkout.write(".dvc/config.local", b"['remote \"store\"']\nurl = ssh://host/remote\n");
    let error = files(&source).await.unwrap_err().to_string();
    assert!(error.contains("remote 'store' is at ssh://; expected a path, s3://"), "{error}");
    checkout.write(".dvc/config.local", b"[core]\nremote = other\n");
    let error = files(&source).await.unwrap_err().to_string();
    assert!(error.contains("remote 'other' has no url"), "{error}");

    let version = source.look().await.unwrap().models["iris"].versions[0].clone();
    checkout.write("iris.onnx.dvc", format!("outs: [{{md5: {}, path: a}}]", "0".repeat(32)).as_bytes());
    let error = source.artifact(&ModelName::parse("iris").unwrap(), &version).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error}");
}

#[test]
fn a_uri_names_a_pointer_in_a_checkout() {
    let open = |text: &str| Tracked::open(&SourceUri::parse(text).unwrap());
    let tracked = open("dvc:///srv/my%20models#sub/iris.safetensors.dvc").unwrap();
    assert_eq!((tracked.checkout, tracked.model.as_str()), (PathBuf::from("/srv/my models"), "iris"));
    for wrong in
        ["dvc://a#iris.onnx", "dvc://a#../iris.dvc", "dvc://a#/iris.dvc", "dvc://a#a%20b.dvc", "dvc://a#%ff.dvc"]
    {
        assert!(open(wrong).is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn the_checkout_says_its_commit_and_the_pointer_what_it_points_at() {
    let checkout = Checkout::new(CONFIG);
    let commit = "0123456789abcdef0123456789abcdef01234567";
    checkout.write(".git/HEAD", b"ref: refs/heads/main\n");
    checkout.write(".git/refs/heads/main", commit.as_bytes());
    checkout.write(
        "iris.onnx.dvc",
        format!("outs:\n- md5: {}\n  path: iris.onnx\n  desc: Species\n", md5(b"g")).as_bytes(),
    );
    let source = checkout.open("iris.onnx.dvc");
    let look = source.look().await.unwrap();
    let (name, model) = look.models.first_key_value().unwrap();
    let found = source.lineage(name, &model.versions[0]).await.unwrap().unwrap();
    assert_eq!((found.git_commit.as_deref(), found.description.as_deref()), (Some(commit), Some("Species")));
    let names = source.names(name, model).await.unwrap().unwrap();
    assert_eq!(names.aliases["main"], model.versions[0].version.as_str());
    checkout.write(".git/HEAD", commit.as_bytes());
    assert_eq!(source.names(name, model).await, Ok(Some(Names::default())));

    // What it says now is of another version.
    let other = format!("outs:\n- md5: {}\n  path: iris.onnx\n  desc: Other\n", md5(b"h"));
    checkout.write("iris.onnx.dvc", other.as_bytes());
    let error = source.lineage(name, &model.versions[0]).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error}");
}
