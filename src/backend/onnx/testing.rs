//! Tiny ONNX models for the tests, built from the wire format up.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use prost::Message;
use tempfile::TempDir;

use super::OnnxRuntime;
use crate::tensor::DType;

/// The runtime that all tests of the process share.
pub fn runtime() -> &'static OnnxRuntime {
    static RUNTIME: OnceLock<OnnxRuntime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let path = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
        let path = path.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".onnxruntime"));
        OnnxRuntime::open(Some(&path), None).unwrap()
    })
}

/// `TensorProto.DataType` of a protocol type.
pub fn element(dtype: DType) -> i32 {
    match dtype {
        DType::Fp32 => 1,
        DType::Uint8 => 2,
        DType::Int8 => 3,
        DType::Uint16 => 4,
        DType::Int16 => 5,
        DType::Int32 => 6,
        DType::Int64 => 7,
        DType::Bytes => 8,
        DType::Bool => 9,
        DType::Fp16 => 10,
        DType::Fp64 => 11,
        DType::Uint32 => 12,
        DType::Uint64 => 13,
        DType::Bf16 => 16,
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct Model {
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    #[prost(message, optional, tag = "7")]
    pub graph: Option<Graph>,
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<Opset>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Opset {
    #[prost(int64, tag = "2")]
    pub version: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<Node>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(message, repeated, tag = "5")]
    pub initializers: Vec<Initializer>,
    #[prost(message, repeated, tag = "11")]
    pub inputs: Vec<Value>,
    #[prost(message, repeated, tag = "12")]
    pub outputs: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Node {
    #[prost(string, repeated, tag = "1")]
    pub inputs: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub outputs: Vec<String>,
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(message, repeated, tag = "5")]
    pub attributes: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "5")]
    pub tensor: Option<Initializer>,
    #[prost(message, optional, tag = "6")]
    pub graph: Option<Graph>,
    #[prost(int32, tag = "20")]
    pub kind: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Initializer {
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub element: i32,
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(bytes = "vec", tag = "9")]
    pub raw: Vec<u8>,
    #[prost(message, repeated, tag = "13")]
    pub external: Vec<super::graph::Entry>,
    #[prost(int32, tag = "14")]
    pub location: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub kind: Option<Type>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Type {
    #[prost(message, optional, boxed, tag = "1")]
    pub tensor: Option<Box<TensorType>>,
    #[prost(message, optional, boxed, tag = "4")]
    pub sequence: Option<Box<Sequence>>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    #[prost(int32, tag = "1")]
    pub element: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<super::graph::Shape>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Sequence {
    #[prost(message, optional, boxed, tag = "1")]
    pub item: Option<Box<Type>>,
}

/// A tensor type; `None` as shape leaves even the rank open, -1 a dimension.
pub fn tensor(element: i32, shape: Option<&[i64]>) -> Type {
    let dim = |&dim: &i64| super::graph::Dim { value: (dim >= 0).then_some(dim) };
    let shape = shape.map(|dims| super::graph::Shape { dims: dims.iter().map(dim).collect() });
    Type { tensor: Some(Box::new(TensorType { element, shape })), sequence: None }
}

pub fn sequence(item: Type) -> Type {
    Type { tensor: None, sequence: Some(Box::new(Sequence { item: Some(Box::new(item)) })) }
}

pub fn value(name: &str, kind: Type) -> Value {
    Value { name: name.to_owned(), kind: Some(kind) }
}

pub fn node(op_type: &str, inputs: &[&str], outputs: &[&str]) -> Node {
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    Node { inputs: names(inputs), outputs: names(outputs), op_type: op_type.to_owned(), attributes: Vec::new() }
}

/// A float initializer whose elements lie at `offset` of another file.
pub fn external(name: &str, dims: &[i64], location: &str, offset: usize) -> Initializer {
    let length = dims.iter().product::<i64>() * 4;
    let entry = |key: &str, value: String| super::graph::Entry { key: key.to_owned(), value };
    Initializer {
        dims: dims.to_vec(),
        element: 1,
        name: name.to_owned(),
        external: vec![
            entry("location", location.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", length.to_string()),
        ],
        location: super::graph::EXTERNAL,
        ..Initializer::default()
    }
}

pub fn graph(nodes: Vec<Node>, inputs: Vec<Value>, outputs: Vec<Value>) -> Graph {
    Graph { nodes, name: "graph".to_owned(), initializers: Vec::new(), inputs, outputs }
}

/// `y = x`.
pub fn identity(dtype: DType, shape: &[i64]) -> Graph {
    let kind = tensor(element(dtype), Some(shape));
    graph(vec![node("Identity", &["x"], &["y"])], vec![value("x", kind.clone())], vec![value("y", kind)])
}

/// `y = x + w` over rows of `width` floats, `w` lying in another file.
pub fn add_external(width: i64, location: &str, offset: usize) -> Graph {
    let kind = tensor(1, Some(&[-1, width]));
    let mut graph =
        graph(vec![node("Add", &["x", "w"], &["y"])], vec![value("x", kind.clone())], vec![value("y", kind)]);
    graph.initializers.push(external("w", &[width], location, offset));
    graph
}

pub fn encode(graph: Graph, opset: i64) -> Vec<u8> {
    Model { ir_version: 9, graph: Some(graph), opset_import: vec![Opset { version: opset }] }.encode_to_vec()
}

/// A model directory that holds `graph` alone.
pub fn directory(graph: Graph) -> TempDir {
    directory_of(&encode(graph, 17))
}

/// A model directory whose model file is `bytes`.
pub fn directory_of(bytes: &[u8]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("model.onnx"), bytes).unwrap();
    directory
}
