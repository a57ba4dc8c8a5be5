//! What a model's author says of its inputs and outputs, and a session that looks that way from outside.
//!
//! A graph need not look like what its clients send: a dimension of size one may be missing or too many, and inputs
//! that the graph has a value for may be left out. The declaration is checked against the graph once, at load.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Session, Signature, TensorSpec};
use crate::{
    error::Error,
    tensor::{DType, Shape, Tensor},
};

/// One input or output as the model's author declares it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Declaration {
    pub name: String,
    /// Default: the graph's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datatype: Option<DType>,
    /// As clients see it, the batch dimension included; -1 is any size. Default: the graph's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Vec<i64>>,
    /// As the graph sees it, when that is another shape of as many elements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reshape: Option<Vec<i64>>,
    /// Whether a request may leave the input out; the graph must have a value for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// What a model's author declares of its inputs and outputs; empty for what the graph says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Those that are not declared are as the graph has them.
    pub inputs: Vec<Declaration>,
    /// When there are any, they are all that the model gives.
    pub outputs: Vec<Declaration>,
}

/// A session behind a declared interface.
struct Declared {
    inner: Box<dyn Session>,
    signature: Signature,
    /// By position in the outward signature.
    inputs: Vec<Option<Reshape>>,
    /// Position in the graph's outputs, and the way back to the declared shape.
    outputs: Vec<(usize, Option<Reshape>)>,
}

/// From one shape to another of as many elements; the free dimensions of both stand in the same order.
#[derive(Clone, Debug, PartialEq)]
struct Reshape {
    from: Vec<i64>,
    to: Vec<i64>,
}

impl Declaration {
    /// # Errors
    /// What is wrong with the declaration, whatever the graph looks like.
    pub fn validate(&self) -> Result<(), String> {
        let name = &self.name;
        let shapes = [("shape", &self.shape), ("reshape", &self.reshape)];
        let bad = |shape: &Vec<i64>| shape.iter().any(|&size| size < -1 || size == 0);
        if let Some((key, Some(shape))) = shapes.into_iter().find(|(_, shape)| shape.as_ref().is_some_and(bad)) {
            return Err(format!("'{name}': {key} {shape:?} must hold sizes of at least 1, or -1 for any"));
        }
        match (&self.shape, &self.reshape) {
            (Some(from), Some(to)) => {
                Reshape::new(from, to).map(|_| ()).map_err(|reason| format!("'{name}': {reason}"))
            }
            (None, Some(_)) => Err(format!("'{name}': reshape needs the shape that clients see")),
            (_, None) => Ok(()),
        }
    }

    /// The tensor as clients see it, and the way from there to the graph's shape.
    fn apply(&self, kind: &str, graph: &TensorSpec) -> Result<(TensorSpec, Option<Reshape>), Error> {
        let name = &self.name;
        if let Some(datatype) = self.datatype.filter(|&datatype| datatype != graph.dtype) {
            return Err(Error::invalid(format!(
                "{kind} '{name}' is declared as {datatype}, and the graph has {}",
                graph.dtype
            )));
        }
        let Some(shape) = &self.shape else { return Ok((graph.clone(), None)) };
        let inner = self.reshape.as_ref().unwrap_or(shape);
        // A free dimension of the graph takes any size; a graph without dimensions may not know its rank.
        let unknown = kind == "output" && graph.shape.is_empty();
        let fits = inner.len() == graph.shape.len()
            && inner.iter().zip(&graph.shape).all(|(&declared, &size)| size < 0 || declared == size);
        if !fits && !unknown {
            return Err(Error::invalid(format!(
                "{kind} '{name}' is declared with shape {inner:?}, and the graph has {:?} (-1 is any size)",
                graph.shape
            )));
        }
        let reshape = match &self.reshape {
            Some(inner) => Some(
                Reshape::new(shape, inner).map_err(|reason| Error::invalid(format!("{kind} '{name}': {reason}")))?,
            ),
            None => None,
        };
        Ok((TensorSpec { name: graph.name.clone(), dtype: graph.dtype, shape: shape.clone() }, reshape))
    }
}

impl Interface {
    /// Puts the interface before `session`; the session itself when nothing is declared.
    ///
    /// # Errors
    /// `InvalidArgument` naming the input or output that the graph has not, or has otherwise.
    pub fn before(&self, session: Box<dyn Session>) -> Result<Box<dyn Session>, Error> {
        if *self == Self::default() {
            return Ok(session);
        }
        let graph = session.signature();
        let mut signature = Signature { steady: graph.steady, notes: graph.notes.clone(), ..Signature::default() };
        let mut inputs = Vec::new();
        self.check_inputs(graph)?;
        let declared = |name: &str| self.inputs.iter().find(|declared| declared.name == name);
        // What the graph has a value for shows only when it is declared.
        let defaults = graph.defaults.iter().filter(|spec| declared(&spec.name).is_some());
        for spec in graph.inputs.iter().chain(defaults) {
            let (outward, reshape) = match declared(&spec.name) {
                Some(declared) => declared.apply("input", spec)?,
                None => (spec.clone(), None),
            };
            if declared(&spec.name).map_or_else(|| graph.is_optional(&spec.name), |declared| declared.optional) {
                signature.optional.push(spec.name.clone());
            }
            signature.inputs.push(outward);
            inputs.push(reshape);
        }
        let mut outputs = Vec::new();
        for declared in &self.outputs {
            let index = graph.outputs.iter().position(|spec| *spec.name == declared.name);
            let index = index.ok_or_else(|| missing("output", &declared.name, &graph.outputs))?;
            let (outward, reshape) = declared.apply("output", &graph.outputs[index])?;
            signature.outputs.push(outward);
            outputs.push((index, reshape.map(Reshape::reversed)));
        }
        if self.outputs.is_empty() {
            signature.outputs.clone_from(&graph.outputs);
            outputs.extend((0..graph.outputs.len()).map(|index| (index, None)));
        }
        Ok(Box::new(Declared { inner: session, signature, inputs, outputs }))
    }

    fn check_inputs(&self, graph: &Signature) -> Result<(), Error> {
        for declared in &self.inputs {
            let has = |specs: &[TensorSpec]| specs.iter().any(|spec| *spec.name == declared.name);
            if declared.optional && has(&graph.inputs) && !graph.is_optional(&declared.name) {
                return Err(Error::invalid(format!(
                    "input '{}' is declared optional, and the graph has no value for it (no initializer)",
                    declared.name
                )));
            }
            if !has(&graph.inputs) && !has(&graph.defaults) {
                return Err(missing("input", &declared.name, &graph.inputs));
            }
        }
        Ok(())
    }
}

fn missing(kind: &str, name: &str, specs: &[TensorSpec]) -> Error {
    let known: Vec<String> = specs.iter().map(|spec| format!("'{}'", spec.name)).collect();
    Error::invalid(format!("the graph has no {kind} '{name}'; its {kind}s are {}", known.join(", ")))
}

impl Session for Declared {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let mut shaped = inputs.to_vec();
        let specs = self.signature.inputs.iter().zip(&self.inputs);
        for (spec, reshape) in specs.filter_map(|(spec, reshape)| Some((spec, reshape.as_ref()?))) {
            if let Some(tensor) = shaped.iter_mut().find(|tensor| tensor.name == spec.name) {
                tensor.shape = reshape.apply(&tensor.shape)?;
            }
        }
        let given = self.inner.run(&shaped)?;
        let pick = |(index, reshape): &(usize, Option<Reshape>)| {
            let output = given.get(*index).ok_or_else(|| Error::internal("the graph gave too few outputs"))?;
            let shape = reshape.as_ref().map(|reshape| reshape.apply(&output.shape)).transpose()?;
            Ok(Tensor { shape: shape.unwrap_or_else(|| output.shape.clone()), ..output.clone() })
        };
        self.outputs.iter().map(pick).collect()
    }
}

impl Reshape {
    fn new(from: &[i64], to: &[i64]) -> Result<Self, String> {
        let free = |shape: &[i64]| shape.iter().filter(|&&size| size < 0).count();
        let fixed = |shape: &[i64]| {
            shape.iter().filter(|&&size| size >= 0).try_fold(1_i64, |product, &size| product.checked_mul(size))
        };
        if free(from) != free(to) || fixed(from).is_none() || fixed(from) != fixed(to) {
            return Err(format!("shape {from:?} cannot become {to:?}: both need as many elements, and as many -1"));
        }
        Ok(Self { from: from.to_vec(), to: to.to_vec() })
    }

    fn reversed(self) -> Self {
        Self { from: self.to, to: self.from }
    }

    /// # Errors
    /// `Internal` when `shape` is not what was declared; a graph may give other shapes than it declares.
    fn apply(&self, shape: &[usize]) -> Result<Shape, Error> {
        let fits = shape.len() == self.from.len()
            && shape.iter().zip(&self.from).all(|(&size, &declared)| declared < 0 || declared as usize == size);
        if !fits {
            return Err(Error::internal(format!("a tensor has shape {shape:?}, declared is {:?}", self.from)));
        }
        let mut free = shape.iter().zip(&self.from).filter(|(_, declared)| **declared < 0).map(|(&size, _)| size);
        let size = |&declared: &i64| if declared < 0 { free.next().unwrap_or(1) } else { declared as usize };
        Ok(self.to.iter().map(size).collect())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::tensor::Data;

    /// Takes `x` [-1, 2, 2] and perhaps `bias` [1]; gives `sum` [-1] and the shape that it saw as `seen`.
    struct Graph(Signature);

    fn spec(name: &str, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype: DType::Uint8, shape: shape.to_vec() }
    }

    fn graph() -> Box<dyn Session> {
        Box::new(Graph(Signature {
            inputs: vec![spec("x", &[-1, 2, 2])],
            outputs: vec![spec("sum", &[-1]), spec("seen", &[-1])],
            defaults: vec![spec("bias", &[1])],
            ..Signature::default()
        }))
    }

    impl Session for Graph {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            let Data::Plain(x) = &inputs[0].data else { unreachable!() };
            let bias = inputs.iter().find(|input| &*input.name == "bias").map_or(0, |bias| match &bias.data {
                Data::Plain(bytes) => bytes[0],
                Data::Strings(_) => unreachable!(),
            });
            let sums: Vec<u8> = x.chunks(4).map(|row| row.iter().sum::<u8>() + bias).collect();
            let seen: Vec<u8> = inputs[0].shape.iter().map(|&size| size as u8).collect();
            Ok(vec![bytes("sum", &[sums.len()], &sums), bytes("seen", &[seen.len()], &seen)])
        }
    }

    fn bytes(name: &str, shape: &[usize], values: &[u8]) -> Tensor {
        let data = Data::Plain(Bytes::copy_from_slice(values));
        Tensor::new(name.into(), DType::Uint8, shape.into(), data).unwrap()
    }

    fn declare(name: &str, shape: &[i64], reshape: Option<&[i64]>) -> Declaration {
        let reshape = reshape.map(<[i64]>::to_vec);
        Declaration { name: name.into(), shape: Some(shape.to_vec()), reshape, ..Declaration::default() }
    }

    fn refused(inputs: Vec<Declaration>, outputs: Vec<Declaration>) -> String {
        Interface { inputs, outputs }.before(graph()).err().unwrap().message
    }

    #[test]
    fn shapes_are_changed_on_the_way_in_and_back() {
        let inputs = vec![declare("x", &[-1, 4], Some(&[-1, 2, 2]))];
        let outputs = vec![declare("sum", &[-1, 1], Some(&[-1]))];
        let mut session = Interface { inputs, outputs }.before(graph()).unwrap();
        assert_eq!(session.signature().inputs, [spec("x", &[-1, 4])]);
        assert_eq!(session.signature().outputs, [spec("sum", &[-1, 1])]);
        let given = session.run(&[bytes("x", &[2, 4], &[1, 2, 3, 4, 5, 6, 7, 8])]).unwrap();
        assert_eq!(given, [bytes("sum", &[2, 1], &[10, 26])]);
    }

    #[test]
    fn outputs_come_in_the_declared_order() {
        let outputs = vec![declare("seen", &[-1], None), declare("sum", &[-1], None)];
        let mut session = Interface { outputs, ..Interface::default() }.before(graph()).unwrap();
        let given = session.run(&[bytes("x", &[1, 2, 2], &[1, 1, 1, 1])]).unwrap();
        assert_eq!(given, [bytes("seen", &[3], &[1, 2, 2]), bytes("sum", &[1], &[4])]);
    }

    #[test]
    fn optional_inputs_may_be_left_out() {
        let bias = Declaration { optional: true, ..declare("bias", &[1], None) };
        let mut session = Interface { inputs: vec![bias], ..Interface::default() }.before(graph()).unwrap();
        let x = bytes("x", &[1, 2, 2], &[1, 1, 1, 1]);
        let signature = session.signature().clone();
        assert_eq!(signature.optional, [std::sync::Arc::<str>::from("bias")]);
        let alone = signature.arrange("m", vec![x.clone()]).unwrap();
        assert_eq!(session.run(&alone).unwrap()[0], bytes("sum", &[1], &[4]));
        let both = signature.arrange("m", vec![bytes("bias", &[1], &[3]), x]).unwrap();
        assert_eq!(&*both[0].name, "x");
        assert_eq!(session.run(&both).unwrap()[0], bytes("sum", &[1], &[7]));
        assert!(
            signature.arrange("m", vec![bytes("bias", &[1], &[3])]).unwrap_err().message.contains("'x' is missing")
        );
    }

    #[test]
    fn what_the_graph_does_not_have_is_refused_by_name() {
        let wrong_type = Declaration { datatype: Some(DType::Fp32), ..declare("x", &[-1, 2, 2], None) };
        assert_eq!(refused(vec![wrong_type], vec![]), "input 'x' is declared as FP32, and the graph has UINT8");
        assert_eq!(
            refused(vec![declare("x", &[-1, 4], None)], vec![]),
            "input 'x' is declared with shape [-1, 4], and the graph has [-1, 2, 2] (-1 is any size)"
        );
        assert!(refused(vec![declare("x", &[-1, -1, 2], None)], vec![]).contains("[-1, -1, 2]"));
        assert_eq!(refused(vec![declare("y", &[1], None)], vec![]), "the graph has no input 'y'; its inputs are 'x'");
        assert!(refused(vec![], vec![declare("z", &[1], None)]).contains("its outputs are 'sum', 'seen'"));
        let optional = Declaration { optional: true, ..declare("x", &[-1, 2, 2], None) };
        assert!(refused(vec![optional], vec![]).contains("no value for it"));
    }

    #[test]
    fn shapes_that_cannot_become_each_other_are_refused() {
        for (shape, reshape) in [(vec![-1, 4], vec![-1, 3]), (vec![-1, 4], vec![4]), (vec![i64::MAX, 2], vec![1])] {
            let message = declare("x", &shape, Some(&reshape)).validate().unwrap_err();
            assert!(message.contains("'x'") && message.contains("cannot become"), "{message}");
        }
        assert!(declare("x", &[0], None).validate().unwrap_err().contains("at least 1"));
        assert!(declare("x", &[-1, 1], Some(&[-1])).validate().is_ok());
    }
}
