//! A server in this process whose models are scripts, and the clients that talk to it.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidegate::{
    api::pb::{self, grpc_inference_service_client::GrpcInferenceServiceClient},
    backend::{Backend, Backends, Options, Session, Signature, TensorSpec, onnx::OnnxRuntime},
    config::Config,
    error::{Code, Error},
    logging::Logging,
    server::{Server, Stopper},
    tensor::{DType, Data, Tensor},
};

/// A model whose file says what it does: `y = scale · x`, after a while, or not at all.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    pub scale: f32,
    /// How long each run takes.
    pub sleep_ms: u64,
    /// A run with this value among its inputs fails.
    pub refuse: f32,
    /// A run with this value among its inputs panics.
    pub panic: f32,
    pub fail_load: bool,
    /// The code that a failed load has.
    pub fail_code: String,
    /// How long loading takes.
    pub load_ms: u64,
    /// A run waits while this file is there.
    pub gate: PathBuf,
    /// Gets a line for each load and for each run when it begins, which is the run's first value.
    pub diary: PathBuf,
    /// The name of the input.
    pub input: String,
    /// Answers the scheduling policy of the thread that runs it, as the kernel tells it: 5 is `SCHED_IDLE`.
    pub tell_policy: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            scale: 1.0,
            sleep_ms: 0,
            refuse: f32::NAN,
            panic: f32::NAN,
            fail_load: false,
            fail_code: Code::InvalidArgument.as_str().to_owned(),
            load_ms: 0,
            gate: PathBuf::new(),
            diary: PathBuf::new(),
            input: "x".to_owned(),
            tell_policy: false,
        }
    }
}

impl Script {
    fn note(&self, line: &str) {
        if !self.diary.as_os_str().is_empty() {
            let diary = std::fs::OpenOptions::new().create(true).append(true).open(&self.diary);
            writeln!(diary.unwrap(), "{line}").unwrap();
        }
    }
}

/// What a script's diary says of a load.
pub const LOADED: &str = "loaded";

/// The lines of a script's diary.
pub fn diary(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

struct ScriptBackend;

impl Backend for ScriptBackend {
    fn name(&self) -> &'static str {
        "script"
    }

    fn file_name(&self) -> &'static str {
        "model.script"
    }

    fn platform(&self) -> &'static str {
        "script"
    }

    fn gpus(&self) -> usize {
        0
    }

    fn load(&self, model: &Path, _: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error> {
        let text = std::fs::read_to_string(model).unwrap();
        let script: Script = toml::from_str(&text).map_err(|error| Error::invalid(error.to_string()))?;
        script.note(LOADED);
        std::thread::sleep(Duration::from_millis(script.load_ms));
        if script.fail_load {
            let code = Code::ALL.into_iter().find(|code| code.as_str() == script.fail_code).unwrap();
            return Err(Error::new(code, "the script says so"));
        }
        let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: vec![-1] };
        let signature =
            Signature { inputs: vec![spec(&script.input)], outputs: vec![spec("y")], ..Signature::default() };
        let session = || Box::new(ScriptSession { script: script.clone(), signature: signature.clone() }) as _;
        Ok((0..instances).map(|_| session()).collect())
    }
}

struct ScriptSession {
    script: Script,
    signature: Signature,
}

impl Session for ScriptSession {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let Data::Plain(bytes) = &inputs[0].data else { unreachable!() };
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        self.script.note(&values.first().map_or_else(String::new, f32::to_string));
        std::thread::sleep(Duration::from_millis(self.script.sleep_ms));
        while self.script.gate.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if values.contains(&self.script.refuse) {
            return Err(Error::invalid("the script refuses this value"));
        }
        assert!(!values.contains(&self.script.panic), "as scripted");
        if self.script.tell_policy {
            let policy = vec![scheduling_policy(); values.len()].into_iter().flat_map(f32::to_le_bytes).collect();
            return Ok(vec![Tensor::new("y".into(), DType::Fp32, inputs[0].shape.clone(), Data::Plain(policy))?]);
        }
        let scaled = values.iter().flat_map(|value| (value * self.script.scale).to_le_bytes()).collect();
        Ok(vec![Tensor::new("y".into(), DType::Fp32, inputs[0].shape.clone(), Data::Plain(scaled))?])
    }
}

/// Of the calling thread.
pub fn scheduling_policy() -> f32 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().nth(38).unwrap().parse().unwrap()
}

/// A folder of models.
pub struct Repository(pub TempDir);

impl Repository {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Adds or replaces a version in one rename.
    pub fn put(&self, model: &str, version: &str, script: &str) {
        let staging = self.0.path().join(format!(".{model}-{version}"));
        std::fs::create_dir_all(&staging).unwrap();
        std::fs::write(staging.join("model.script"), script).unwrap();
        let folder = self.0.path().join(model);
        std::fs::create_dir_all(&folder).unwrap();
        let target = folder.join(version);
        let _ = std::fs::remove_dir_all(&target);
        std::fs::rename(staging, target).unwrap();
    }

    pub fn settings(&self, model: &str, text: &str) {
        std::fs::create_dir_all(self.0.path().join(model)).unwrap();
        std::fs::write(self.0.path().join(model).join("model.toml"), text).unwrap();
    }

    pub fn with(model: &str, script: &str) -> Self {
        let repository = Self::new();
        repository.put(model, "1", script);
        repository
    }
}

/// A running server and clients for it.
pub struct Running {
    pub server: Option<Server>,
    pub stopper: Stopper,
    pub rest: String,
    pub ops: String,
    pub grpc: GrpcClient,
    pub grpc_address: std::net::SocketAddr,
    pub rest_address: std::net::SocketAddr,
    client: HttpClient<Full<Bytes>>,
}

pub type HttpClient<B> = Client<HttpConnector, B>;
pub type GrpcClient = GrpcInferenceServiceClient<HttpClient<tonic::body::Body>>;

/// A client with a connection of its own, which its clones share.
pub fn grpc_client(address: std::net::SocketAddr) -> GrpcClient {
    let http2 = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    GrpcInferenceServiceClient::with_origin(http2, format!("http://{address}").parse().unwrap())
}

/// The defaults on ports of their own choosing.
pub fn config(repository: &Repository) -> Config {
    let any = "127.0.0.1:0".parse().unwrap();
    Config { models: repository.0.path().to_path_buf(), rest: any, grpc: any, ops: any, ..Config::default() }
}

pub fn try_start(config: &Config) -> anyhow::Result<Server> {
    try_start_with(config, Arc::new(ScriptBackend))
}

fn try_start_with(config: &Config, backend: Arc<dyn Backend>) -> anyhow::Result<Server> {
    Server::start(config, Backends::new([backend]), "none", Logging::default())
}

/// Starts a server and waits until it is ready.
pub async fn start(config: &Config) -> Running {
    let running = start_unready(config);
    eventually("the server is ready", async || running.get("/v2/health/ready").await.0 == 200).await;
    running
}

pub fn start_unready(config: &Config) -> Running {
    connect(try_start(config).unwrap())
}

/// Starts a server whose models are ONNX files, and waits until it is ready.
pub async fn start_onnx(config: &Config) -> Running {
    let path = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
    let path = path.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".onnxruntime"));
    let backend = OnnxRuntime::open(Some(&path), None).unwrap();
    let running = connect(try_start_with(config, Arc::new(backend)).unwrap());
    eventually("the server is ready", async || running.get("/v2/health/ready").await.0 == 200).await;
    running
}

fn connect(server: Server) -> Running {
    Running {
        stopper: server.stopper(),
        rest: format!("http://{}", server.rest),
        ops: format!("http://{}", server.ops),
        grpc: grpc_client(server.grpc),
        grpc_address: server.grpc,
        rest_address: server.rest,
        client: Client::builder(TokioExecutor::new()).build_http(),
        server: Some(server),
    }
}

/// Waits for `condition`, at most a minute.
pub async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub struct Reply {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: Value,
}

impl Running {
    /// Stops the server at once; the number of requests that were cut short.
    pub async fn stop(mut self) -> usize {
        self.stopper.stop(Duration::ZERO);
        let server = self.server.take().unwrap();
        tokio::task::spawn_blocking(|| server.wait()).await.unwrap().unwrap()
    }

    pub async fn send(&self, request: http::Request<Full<Bytes>>) -> Result<Reply, hyper_util::client::legacy::Error> {
        let response = self.client.request(request).await?;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body })
    }

    /// GET from the REST port.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.fetch(&self.rest, path).await
    }

    /// GET from the operators' port.
    pub async fn ops(&self, path: &str) -> (u16, Value) {
        self.fetch(&self.ops, path).await
    }

    async fn fetch(&self, host: &str, path: &str) -> (u16, Value) {
        let request = http::Request::get(format!("{host}{path}")).body(Full::default()).unwrap();
        let reply = self.send(request).await.unwrap();
        (reply.status, reply.body)
    }

    /// POST to the REST port; a body of `null` is left out.
    pub async fn post(&self, path: &str, body: Value, headers: &[(&str, &str)]) -> Reply {
        let mut request = http::Request::post(format!("{}{path}", self.rest));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(request.body(Full::from(body)).unwrap()).await.unwrap()
    }

    pub fn infer_request(&self, model: &str, values: &[f32], headers: &[(&str, &str)]) -> http::Request<Full<Bytes>> {
        let body = json!({
            "inputs": [{ "name": "x", "datatype": "FP32", "shape": [values.len()], "data": values }]
        });
        let mut request = http::Request::post(format!("{}/v2/models/{model}/infer", self.rest));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Full::from(body.to_string())).unwrap()
    }

    pub async fn infer(&self, model: &str, values: &[f32]) -> Reply {
        self.send(self.infer_request(model, values, &[])).await.unwrap()
    }

    /// The value of a series on the metrics page, 0 when it is not there.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, page) = self.ops("/metrics").await;
        let line = page.as_str().unwrap().lines().find(|line| line.starts_with(&format!("{series} ")));
        line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }
}

impl Reply {
    pub fn values(&self) -> Vec<f64> {
        let data = self.body["outputs"][0]["data"].as_array();
        data.unwrap_or_else(|| panic!("{}", self.body)).iter().map(|value| value.as_f64().unwrap()).collect()
    }

    pub fn error(&self) -> &str {
        self.body["error"].as_str().unwrap_or_else(|| panic!("{}", self.body))
    }
}

/// The gRPC twin of `Running::infer`.
pub fn infer_message(model: &str, values: &[f32]) -> pb::ModelInferRequest {
    let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![pb::model_infer_request::InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![values.len() as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![raw],
        ..Default::default()
    }
}

pub fn message_values(response: &pb::ModelInferResponse) -> Vec<f32> {
    response.raw_output_contents[0].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}
