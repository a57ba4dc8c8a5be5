//! `Model`: the few fields of an ONNX file that must be known before ONNX Runtime reads it.
//!
//! ONNX Runtime does not tell which other files a model needs, nor an input of unknown rank from a scalar. Field
//! numbers are those of `onnx.proto`; everything not named here is skipped unread, weights included.

use prost::Message;

/// `TensorProto.DataLocation.EXTERNAL`.
pub const EXTERNAL: i32 = 1;

/// Operators that do as much work as one of their input's values says. Those that run graphs of their own, such as
/// `Loop`, are known by their attributes.
const OPEN_ENDED: [&str; 15] = [
    "CenterCropPad",
    "Compress",
    "ConstantOfShape",
    "Expand",
    "MaxUnpool",
    "NonMaxSuppression",
    "NonZero",
    "OneHot",
    "Pad",
    "Range",
    "Resize",
    "Tile",
    "TopK",
    "Unique",
    "Upsample",
];

#[derive(Clone, PartialEq, Message)]
pub struct Model {
    #[prost(message, optional, tag = "7")]
    pub graph: Option<Graph>,
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<Function>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Function {
    #[prost(message, repeated, tag = "7")]
    pub nodes: Vec<Node>,
    #[prost(message, repeated, tag = "11")]
    pub attributes: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<Node>,
    #[prost(message, repeated, tag = "5")]
    pub initializers: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    pub inputs: Vec<Value>,
    #[prost(message, repeated, tag = "12")]
    pub outputs: Vec<Value>,
    #[prost(message, repeated, tag = "15")]
    pub sparse_initializers: Vec<SparseTensor>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Node {
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(message, repeated, tag = "5")]
    pub attributes: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    #[prost(message, optional, tag = "5")]
    pub tensor: Option<Tensor>,
    #[prost(message, optional, tag = "6")]
    pub graph: Option<Graph>,
    #[prost(message, repeated, tag = "10")]
    pub tensors: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    pub graphs: Vec<Graph>,
    #[prost(message, optional, tag = "22")]
    pub sparse_tensor: Option<SparseTensor>,
    #[prost(message, repeated, tag = "23")]
    pub sparse_tensors: Vec<SparseTensor>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SparseTensor {
    #[prost(message, optional, tag = "1")]
    pub values: Option<Tensor>,
    #[prost(message, optional, tag = "2")]
    pub indices: Option<Tensor>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<Entry>,
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// A graph's input or output.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub kind: Option<Type>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Type {
    #[prost(message, optional, tag = "1")]
    pub tensor: Option<TensorType>,
    #[prost(message, optional, tag = "8")]
    pub sparse_tensor: Option<TensorType>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Shape {
    #[prost(message, repeated, tag = "1")]
    pub dims: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Dim {
    #[prost(int64, optional, tag = "1")]
    pub value: Option<i64>,
}

impl Model {
    pub fn input(&self, name: &str) -> Option<&Value> {
        self.graph.as_ref()?.inputs.iter().find(|value| value.name == name)
    }

    pub fn output(&self, name: &str) -> Option<&Value> {
        self.graph.as_ref()?.outputs.iter().find(|value| value.name == name)
    }

    /// Whether every input states every dimension, so that all allocations can be planned ahead.
    pub fn has_fixed_shapes(&self) -> bool {
        let inputs = self.graph.iter().flat_map(|graph| &graph.inputs);
        inputs.into_iter().all(|input| {
            let shape =
                input.kind.as_ref().and_then(|kind| kind.tensor.as_ref()).and_then(|tensor| tensor.shape.as_ref());
            shape.is_some_and(|shape| shape.dims.iter().all(|dim| dim.value.is_some()))
        })
    }

    /// Whether no operator does more work for some values than for others.
    pub fn is_steady(&self) -> bool {
        let steady = |node: &Node| {
            let mut attributes = node.attributes.iter();
            !OPEN_ENDED.contains(&&*node.op_type) && attributes.all(|it| it.graph.is_none() && it.graphs.is_empty())
        };
        self.functions.is_empty() && self.graph.iter().flat_map(|graph| &graph.nodes).all(steady)
    }

    /// Every tensor of the model whose elements lie in another file, and where in the model each tensor sits.
    pub fn external_tensors(&self) -> Vec<(Site, &Tensor)> {
        let mut found = Vec::new();
        if let Some(graph) = &self.graph {
            graph.visit(Site::Main, &mut found);
        }
        for function in &self.functions {
            let attributes = function.nodes.iter().flat_map(|node| &node.attributes).chain(&function.attributes);
            attributes.for_each(|attribute| attribute.visit(Site::Nested, &mut found));
        }
        found
    }
}

/// Where in a model a tensor sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// An initializer or a constant of the main graph: ONNX Runtime takes its content from memory.
    Main,
    /// In a subgraph, a function, some other attribute or a sparse tensor: ONNX Runtime insists on a file, which it
    /// looks for in the working directory.
    Nested,
}

impl Graph {
    // Recursion is as deep as the messages are nested, which decoding limits to 100.
    fn visit<'a>(&'a self, site: Site, found: &mut Vec<(Site, &'a Tensor)>) {
        let external = self.initializers.iter().filter(|tensor| tensor.data_location == EXTERNAL);
        found.extend(external.map(|tensor| (site, tensor)));
        self.sparse_initializers.iter().for_each(|tensor| tensor.visit(found));
        for node in &self.nodes {
            let site = if node.op_type == "Constant" { site } else { Site::Nested };
            node.attributes.iter().for_each(|attribute| attribute.visit(site, found));
        }
    }
}

impl Attribute {
    fn visit<'a>(&'a self, site: Site, found: &mut Vec<(Site, &'a Tensor)>) {
        let tensors = self.tensor.iter().chain(&self.tensors);
        let external = tensors.filter(|tensor| tensor.data_location == EXTERNAL);
        found.extend(external.map(|tensor| (site, tensor)));
        self.graph.iter().chain(&self.graphs).for_each(|graph| graph.visit(Site::Nested, found));
        self.sparse_tensor.iter().chain(&self.sparse_tensors).for_each(|tensor| tensor.visit(found));
    }
}

impl SparseTensor {
    fn visit<'a>(&'a self, found: &mut Vec<(Site, &'a Tensor)>) {
        let tensors = self.values.iter().chain(&self.indices);
        let external = tensors.filter(|tensor| tensor.data_location == EXTERNAL);
        found.extend(external.map(|tensor| (Site::Nested, tensor)));
    }
}

impl Tensor {
    /// The value of `key` among the external-data entries, `location` for instance.
    pub fn entry(&self, key: &str) -> Option<&str> {
        self.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
    }
}

impl Value {
    pub fn is_sparse(&self) -> bool {
        self.kind.as_ref().is_some_and(|kind| kind.sparse_tensor.is_some())
    }

    /// Whether this is a tensor that does not even say how many dimensions it has.
    pub fn has_unknown_rank(&self) -> bool {
        self.kind.as_ref().and_then(|kind| kind.tensor.as_ref()).is_some_and(|tensor| tensor.shape.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_tensors_are_found_wherever_they_hide() {
        let tensor = |name: &str, data_location| Tensor { name: name.into(), data_location, ..Tensor::default() };
        let sparse = |name: &str| SparseTensor { values: Some(tensor(name, EXTERNAL)), indices: None };
        let inner = Graph { initializers: vec![tensor("in subgraph", EXTERNAL)], ..Graph::default() };
        let attribute = Attribute {
            tensor: Some(tensor("in attribute", EXTERNAL)),
            tensors: vec![tensor("in list", EXTERNAL), tensor("inside", 0)],
            graph: Some(inner.clone()),
            graphs: vec![inner],
            sparse_tensor: Some(sparse("sparse attribute")),
            ..Attribute::default()
        };
        let constant = Attribute { tensor: Some(tensor("constant", EXTERNAL)), ..Attribute::default() };
        let graph = Graph {
            nodes: vec![
                Node { op_type: "If".into(), attributes: vec![attribute] },
                Node { op_type: "Constant".into(), attributes: vec![constant] },
            ],
            initializers: vec![tensor("weights", EXTERNAL), tensor("bias", 0)],
            sparse_initializers: vec![sparse("sparse")],
            ..Graph::default()
        };
        let default = Attribute { tensor: Some(tensor("default", EXTERNAL)), ..Attribute::default() };
        let function = Function { attributes: vec![default], ..Function::default() };
        let model = Model { graph: Some(graph), functions: vec![function] };

        let decoded = Model::decode(model.encode_to_vec().as_slice()).unwrap();
        let found = decoded.external_tensors();
        let names: Vec<_> = found.iter().map(|(_, tensor)| tensor.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "weights",
                "sparse",
                "in attribute",
                "in list",
                "in subgraph",
                "in subgraph",
                "sparse attribute",
                "constant",
                "default"
            ]
        );
        assert!(
            found
                .iter()
                .all(|(site, tensor)| (*site == Site::Main) == ["weights", "constant"].contains(&&*tensor.name))
        );
    }

    #[test]
    fn operators_that_do_what_a_value_says_are_not_steady() {
        let node = |kind: &str| Node { op_type: kind.to_owned(), attributes: Vec::new() };
        let looping = Node {
            op_type: "Own".to_owned(),
            attributes: vec![Attribute { graphs: vec![Graph::default()], ..Attribute::default() }],
        };
        for (last, steady) in [(node("Relu"), true), (node("Tile"), false), (looping, false)] {
            let graph = Graph { nodes: vec![node("Gemm"), last], ..Graph::default() };
            let mut model = Model { graph: Some(graph), functions: Vec::new() };
            assert_eq!(model.is_steady(), steady);
            model.functions.push(Function::default());
            assert!(!model.is_steady(), "a function may be anything");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_crash() {
        let mut graph = Graph::default();
        for _ in 0..200 {
            let attribute = Attribute { graph: Some(graph), ..Attribute::default() };
            graph =
                Graph { nodes: vec![Node { op_type: String::new(), attributes: vec![attribute] }], ..Graph::default() };
        }
        let bytes = Model { graph: Some(graph), functions: Vec::new() }.encode_to_vec();
        assert!(Model::decode(bytes.as_slice()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..256)) {
            if let Ok(model) = Model::decode(bytes.as_slice()) {
                model.external_tensors();
            }
        }
    }
}
