//! What a client on the server's machine gains when its tensors stay in shared memory instead of crossing a socket.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context, Result, ensure};
use prost::Message;
use tidegate::{
    api::pb::{
        self, InferParameter,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    tensor::{Data, Tensor},
};

use super::{Bench, in_closed_loop, repository, target, workload::IDENTITY};
use crate::{
    load::{self, Saturation},
    pairs::Pairs,
    report::{Better::Higher, say},
    requests::{INFER, Protocol},
    wire::Request,
};

const REGISTER: &str = "/inference.GRPCInferenceService/SystemSharedMemoryRegister";
const CONFIG: &str = "[shared_memory]\nenabled = true\n";
const REGION: &str = "w3";
/// The only output of the model, which is its input.
const OUTPUT: &str = "same";

impl Bench {
    /// W3 over gRPC with input and output in shared memory, beside the same server with the tensors in the messages,
    /// and the echo, which is sent them too. No client writes or reads its tensors meanwhile, in either way.
    pub(super) fn shared_memory(&mut self) -> Result<()> {
        let model = IDENTITY.model;
        let files = self.files(&IDENTITY).with_context(|| format!("no files of '{model}'"))?;
        let repository = repository(&[(model, &files)])?;
        let config = repository.path().join("tidegate.toml");
        std::fs::write(&config, CONFIG)?;
        let flags = ["--config", config.to_str().context("the path of a temporary folder is no text")?];
        let (server, echo) = (self.programs.serve_with(repository.path(), &flags)?, self.programs.echo()?);
        let row = self.load(&IDENTITY)?.row().clone();
        let Data::Plain(bytes) = &row.data else { anyhow::bail!("the images are texts") };

        // The input, and behind it room for the output.
        let object = tempfile::Builder::new().prefix("tidegate-bench-").tempfile_in("/dev/shm")?;
        object.as_file().set_len(2 * bytes.len() as u64)?;
        object.as_file().write_all_at(bytes, 0)?;
        let key = object.path().file_name().and_then(|name| name.to_str()).context("an object without a name")?;

        let concurrency = (IDENTITY.concurrency)(Protocol::Grpc);
        let sent = Protocol::Grpc.request(model, &row)?;
        let (register, placed) = (registration(key, 2 * bytes.len()), placed(model, &row, bytes.len()));
        let ask = |request| load::ask(&target(&server, Protocol::Grpc, request, concurrency));
        ask(&register).context("registering shared memory")?;
        let contents = Protocol::contents(&ask(&placed)?)?;
        ensure!(contents.iter().all(|raw| raw.is_empty()), "an output in shared memory is sent as well");
        ensure!(second_half(object.as_file(), bytes.len())? == **bytes, "the output in shared memory is not the input");

        let measure = |process, request| {
            let target = target(process, Protocol::Grpc, request, concurrency);
            anyhow::Ok(in_closed_loop(load::closed(&target, self.pace.warm, self.pace.window)?))
        };
        let mut rounds: Pairs<Saturation, (Saturation, Saturation)> = Pairs::new();
        for round in 1..=self.pace.second_pairs {
            say(format_args!("{model} in shared memory under full load, round {round} of {}", self.pace.second_pairs));
            rounds.take(|| measure(&server, &placed), || Ok(measure(&server, &sent)?.and(measure(&echo, &sent)?)))?;
        }
        let mut add = |name: &str, what: &str, unit, value: &dyn Fn(&Saturation, &Saturation, &Saturation) -> f64| {
            let values = rounds.values(|placed, (sent, echo)| value(placed, sent, echo));
            let title = format!("`{model}`, gRPC with shared memory: {what}");
            self.report.median(name, &title, unit, Higher, &values);
        };
        add("w3_shm", "served", "req/s", &|placed, _, _| placed.rate);
        add("w3_shm_vs_grpc", "served ÷ served with the tensors sent", "", &|placed, sent, _| placed.rate / sent.rate);
        add("w3_shm_vs_echo", "served ÷ echo with the tensors sent", "", &|placed, _, echo| placed.rate / echo.rate);
        self.foreign.extend(rounds.foreign());
        Ok(())
    }
}

fn registration(key: &str, byte_size: usize) -> Request {
    let message = pb::SystemSharedMemoryRegisterRequest {
        name: REGION.to_owned(),
        key: format!("/{key}"),
        offset: 0,
        byte_size: byte_size as u64,
    };
    Request::Grpc { path: REGISTER, messages: vec![message.encode_to_vec().into()], deadline: None }
}

/// The request for `row`, whose `byte_size` bytes lie at the start of the region; the output goes behind them.
fn placed(model: &str, row: &Tensor, byte_size: usize) -> Request {
    let number = |number: usize| ParameterChoice::Int64Param(number as i64);
    let at = |offset: usize| {
        [
            ("shared_memory_region", ParameterChoice::StringParam(REGION.to_owned())),
            ("shared_memory_offset", number(offset)),
            ("shared_memory_byte_size", number(byte_size)),
        ]
        .map(|(name, choice)| (name.to_owned(), InferParameter { parameter_choice: Some(choice) }))
        .into()
    };
    let message = pb::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![InferInputTensor {
            name: row.name.to_string(),
            datatype: row.dtype.name().to_owned(),
            shape: row.shape.iter().map(|&size| size as i64).collect(),
            parameters: at(0),
            ..Default::default()
        }],
        outputs: vec![InferRequestedOutputTensor { name: OUTPUT.to_owned(), parameters: at(byte_size) }],
        ..Default::default()
    };
    Request::Grpc { path: INFER, messages: vec![message.encode_to_vec().into()], deadline: None }
}

fn second_half(object: &File, byte_size: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; byte_size];
    object.read_exact_at(&mut bytes, byte_size as u64)?;
    Ok(bytes)
}
