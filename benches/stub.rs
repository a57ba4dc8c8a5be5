//! The real server around a model that costs nothing, or exactly so much: what is left is the server.

use std::{
    io::Write,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Args;
use tidegate::{
    backend::{Backend, Backends, Options, Session, Signature, TensorSpec},
    config::Config,
    control::ModelControl,
    error::Error,
    logging::Logging,
    server::Server,
    tensor::{DType, Data, Tensor},
};

/// The model's name.
pub const MODEL: &str = "stub";
pub const INPUT: &str = "x";
pub const OUTPUT: &str = "y";
const FILE: &str = "model.stub";

/// The model: `x`, FP32 `[-1, inputs]`, in and `y`, FP32 `[-1, outputs]`, out.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stub {
    /// Elements of a row that goes in.
    #[arg(long, default_value_t = 1024)]
    pub inputs: usize,
    /// Elements of a row that comes out; when as many go in, it is the same row.
    #[arg(long, default_value_t = 1024)]
    pub outputs: usize,
    #[arg(long, default_value_t = 8)]
    pub largest_batch: usize,
    /// How long each run keeps its core busy, in µs.
    #[arg(long, default_value_t = 0)]
    pub spin: u64,
}

impl Stub {
    /// What makes this program serve it.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["stub".to_owned()];
        let flags = [("inputs", self.inputs), ("outputs", self.outputs), ("largest-batch", self.largest_batch)];
        arguments.extend(flags.map(|(name, value)| format!("--{name}={value}")));
        arguments.push(format!("--spin={}", self.spin));
        arguments
    }

    /// One row for it, of numbers that are short to write, as people's are.
    ///
    /// # Errors
    /// Never, as long as a row has the elements that its shape says.
    pub fn row(&self) -> Result<Tensor> {
        let data: Vec<u8> = (0..self.inputs).flat_map(|index| (index as f32 % 256.0 / 8.0).to_le_bytes()).collect();
        let shape = [1, self.inputs].as_slice().into();
        Ok(Tensor::new(INPUT.into(), DType::Fp32, shape, Data::Plain(Bytes::from(data)))?)
    }

    /// Serves the model as `tidegate serve` does on one core, says where, and serves on until standard input ends.
    ///
    /// # Errors
    /// When the server does not start, or the model does not load.
    pub fn serve(self, wait: impl FnOnce() -> Result<()>) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let version = folder.path().join(MODEL).join("1");
        std::fs::create_dir_all(&version)?;
        std::fs::write(version.join(FILE), "")?;
        // Of one size and not what a sweep finds, so that what is counted is the same every time.
        let settings = format!(
            "max_batch_size = {0}\nbatching = true\n[queue]\npreferred_batch_sizes = [{0}]\n",
            self.largest_batch
        );
        std::fs::write(folder.path().join(MODEL).join("model.toml"), settings)?;
        let any = "127.0.0.1:0".parse()?;
        let config = Config {
            models: folder.path().to_owned(),
            // Nothing changes, and nobody shall look for it while something else is counted.
            model_control: ModelControl::None,
            rest: any,
            grpc: any,
            ops: any,
            io_threads: Some(1),
            ..Config::default()
        };
        let logging = Logging::start(&config.log)?;
        let server = Server::start(&config, Backends::new([Arc::new(self) as Arc<dyn Backend>]), "none", logging)?;
        let mut changes = server.catalog().changes();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        while !server.catalog().load().complete {
            runtime.block_on(changes.changed()).context("the server ended")?;
        }
        ensure!(server.catalog().load().all_ready(), "the stub does not load");
        writeln!(std::io::stdout(), "  REST  http://{}\n  gRPC  {}\n  try   asking", server.rest, server.grpc)?;
        wait()?;
        server.stopper().stop(Duration::ZERO);
        server.wait()?;
        Ok(())
    }
}

impl Backend for Stub {
    fn name(&self) -> &'static str {
        "stub"
    }

    fn file_name(&self) -> &'static str {
        FILE
    }

    fn platform(&self) -> &'static str {
        "stub"
    }

    fn gpus(&self) -> usize {
        0
    }

    fn load(&self, _: &Path, _: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error> {
        let spec = |name: &str, size: usize| TensorSpec {
            name: name.into(),
            dtype: DType::Fp32,
            shape: vec![-1, i64::try_from(size).unwrap_or(i64::MAX)],
        };
        let signature = Signature {
            inputs: vec![spec(INPUT, self.inputs)],
            outputs: vec![spec(OUTPUT, self.outputs)],
            ..Signature::default()
        };
        let ready = Bytes::from(vec![0; self.largest_batch * self.outputs * size_of::<f32>()]);
        let session = || Box::new(Running { stub: *self, signature: signature.clone(), ready: ready.clone() }) as _;
        Ok((0..instances).map(|_| session()).collect())
    }
}

struct Running {
    stub: Stub,
    signature: Signature,
    /// What comes out when it is not what went in.
    ready: Bytes,
}

impl Session for Running {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let start = Instant::now();
        let [input] = inputs else { return Err(Error::internal("the stub has one input")) };
        let Stub { inputs, outputs, spin, .. } = self.stub;
        let data = match &input.data {
            Data::Plain(bytes) if inputs == outputs => bytes.clone(),
            _ => self.ready.slice(..input.rows() * outputs * size_of::<f32>()),
        };
        let output = self.signature.outputs[0].name.clone();
        let output = Tensor::new(output, DType::Fp32, [input.rows(), outputs].as_slice().into(), Data::Plain(data))?;
        let spin = Duration::from_micros(spin);
        while start.elapsed() < spin {
            std::hint::spin_loop();
        }
        Ok(vec![output])
    }
}
