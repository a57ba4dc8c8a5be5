//! What a graph takes and gives, and whether a request fits it.

use std::sync::Arc;

use crate::{
    error::Error,
    tensor::{DType, Tensor},
};

/// One input or output as the graph declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: Arc<str>,
    pub dtype: DType,
    /// -1 stands for a dimension that the request chooses.
    pub shape: Vec<i64>,
}

/// What a graph takes and gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
    /// Names of the inputs that a request may leave out.
    pub optional: Vec<Arc<str>>,
    /// Of a model that takes raw text as its first input in place of all others, a request giving either: what texts come
    /// as.
    pub text: Option<Pairs>,
    /// Inputs that the graph has a value for; they become optional ones when the model's author declares them.
    pub defaults: Vec<TensorSpec>,
    /// Whether the time of a run follows from its rows alone, so that a few runs tell how long all others take: no
    /// dimension but the first is open, and no operator does as much work as some value asks for.
    pub steady: bool,
    /// Whether a run does all of its work on the thread that asks for it, so that its time is that thread's.
    pub on_thread: bool,
    /// Things about the graph that an operator should know, such as outputs left out.
    pub notes: Vec<String>,
}

/// Whether texts come one for each row, or two that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    Never,
    Maybe,
    Always,
}

impl Pairs {
    /// The shape of texts as a signature shows it; a column of single texts is taken, too.
    pub fn shape(self) -> Vec<i64> {
        if self == Self::Always { vec![-1, 2] } else { vec![-1] }
    }

    fn check(self, text: &Tensor, model: &str) -> Result<(), Error> {
        let name = &text.name;
        if text.dtype != DType::Bytes {
            let message = format!("model '{model}': input '{name}' must be BYTES, got {}", text.dtype);
            return Err(Error::invalid(message));
        }
        match (self, &text.shape[..]) {
            (Self::Never | Self::Maybe, [_] | [_, 1]) | (Self::Maybe | Self::Always, [_, 2]) => Ok(()),
            (_, shape) => {
                let expected = match self {
                    Self::Never => "[-1]",
                    Self::Maybe => "[-1], or [-1, 2] for pairs",
                    Self::Always => "[-1, 2]: pairs",
                };
                Err(Error::invalid(format!(
                    "model '{model}': input '{name}' must have shape {expected} (-1 is any size), got {shape:?}"
                )))
            }
        }
    }
}

impl TensorSpec {
    /// # Errors
    /// `InvalidArgument` naming what differs from the declaration.
    pub fn check(&self, tensor: &Tensor, model: &str) -> Result<(), Error> {
        let name = &self.name;
        if tensor.dtype != self.dtype {
            return Err(Error::invalid(format!(
                "model '{model}': input '{name}' must be {}, got {}",
                self.dtype, tensor.dtype
            )));
        }
        let fits = tensor.shape.len() == self.shape.len()
            && self
                .shape
                .iter()
                .zip(&tensor.shape)
                .all(|(&declared, &given)| declared < 0 || declared as usize == given);
        if fits {
            Ok(())
        } else {
            Err(Error::invalid(format!(
                "model '{model}': input '{name}' must have shape {:?} (-1 is any size), got {:?}",
                self.shape,
                &tensor.shape[..]
            )))
        }
    }
}

impl Signature {
    /// Whether what names no types of its own, or no inputs, is the same tensors for both; `read` is what it was for one.
    pub fn is_read_like(&self, other: &Self, read: &[Tensor]) -> bool {
        let alike = |(one, other): (&TensorSpec, &TensorSpec)| {
            (&one.name, one.dtype, one.shape.len()) == (&other.name, other.dtype, other.shape.len())
        };
        if self.text.is_some() || other.text.is_some() {
            // Text, or tokens, which not all graphs take as integers of one type.
            let both = |tensor: &Tensor| self.input(&tensor.name).zip(other.input(&tensor.name));
            let is_alike = |tensor: &Tensor| both(tensor).is_some_and(alike);
            // Of tokens, who knows more inputs may have been given more.
            let is_text = |tensor: &Tensor| self.sole_input().is_some_and(|text| text.name == tensor.name);
            let all_read = read.iter().all(is_text) || self.inputs.len() == other.inputs.len();
            return self.text.is_some() == other.text.is_some() && all_read && read.iter().all(is_alike);
        }
        self.inputs.len() == other.inputs.len() && self.inputs.iter().zip(&other.inputs).all(alike)
    }

    /// Puts `inputs` into the order of the signature, optional ones left out, and checks names, types and shapes.
    ///
    /// # Errors
    /// `InvalidArgument` naming the model, the input and what was expected.
    pub fn arrange(&self, model: &str, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        if let (Some(pairs), [text, tokens, ..]) = (self.text, &self.inputs[..]) {
            match &inputs[..] {
                [given] if given.name == text.name => return pairs.check(given, model).map(|()| inputs),
                given if given.iter().any(|tensor| tensor.name == text.name) => {
                    return Err(Error::invalid(format!(
                        "model '{model}': input '{}' stands in place of the others; give it alone, or leave it out",
                        text.name
                    )));
                }
                given if !given.iter().any(|tensor| tensor.name == tokens.name) => {
                    return Err(Error::invalid(format!(
                        "model '{model}': input '{}' is missing, and so is '{}'; one of them is needed",
                        text.name, tokens.name
                    )));
                }
                _ => {}
            }
        }
        let in_order = inputs.len() == self.inputs.len()
            && self.inputs.iter().zip(&inputs).all(|(spec, tensor)| spec.name == tensor.name);
        let inputs = if in_order { inputs } else { self.reorder(model, inputs)? };
        let mut specs = self.inputs.iter();
        for tensor in &inputs {
            // Only optional inputs lie between a tensor and the one before it.
            if let Some(spec) = specs.find(|spec| spec.name == tensor.name) {
                spec.check(tensor, model)?;
            }
        }
        Ok(inputs)
    }

    fn reorder(&self, model: &str, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        let mut slots: Vec<Option<Tensor>> = vec![None; self.inputs.len()];
        for tensor in inputs {
            let Some(index) = self.inputs.iter().position(|spec| spec.name == tensor.name) else {
                return Err(Error::invalid(format!(
                    "model '{model}' has no input '{}'; its inputs are {}",
                    crate::id::shorten(&tensor.name),
                    self.input_names()
                )));
            };
            if slots[index].is_some() {
                return Err(Error::invalid(format!("model '{model}': input '{}' is given twice", tensor.name)));
            }
            slots[index] = Some(tensor);
        }
        let missing = |(slot, spec): &(&Option<Tensor>, &TensorSpec)| slot.is_none() && !self.is_optional(&spec.name);
        if let Some((_, spec)) = slots.iter().zip(&self.inputs).find(missing) {
            return Err(Error::invalid(format!(
                "model '{model}': input '{}' is missing; its inputs are {}",
                spec.name,
                self.input_names()
            )));
        }
        Ok(slots.into_iter().flatten().collect())
    }

    /// The input that values without a name are of.
    pub fn sole_input(&self) -> Option<&TensorSpec> {
        match &self.inputs[..] {
            [spec] => Some(spec),
            [text, ..] => self.text.is_some().then_some(text),
            [] => None,
        }
    }

    fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|spec| *spec.name == *name)
    }

    pub fn is_optional(&self, input: &str) -> bool {
        self.optional.iter().any(|name| &**name == input)
    }

    fn input_names(&self) -> String {
        self.inputs.iter().map(|spec| format!("'{}'", spec.name)).collect::<Vec<_>>().join(", ")
    }

    /// Why requests of this graph cannot share a run, judged by its shapes alone; `None` when they may.
    pub fn unbatchable(&self) -> Option<String> {
        let inputs = self.inputs.iter().map(|spec| ("input", spec));
        let outputs = self.outputs.iter().map(|spec| ("output", spec));
        inputs.chain(outputs).find_map(|(kind, spec)| match spec.shape.first() {
            Some(-1) => None,
            Some(size) => Some(format!("{kind} '{}' has the fixed first dimension {size}", spec.name)),
            None => Some(format!("{kind} '{}' is a scalar", spec.name)),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::tensor::Data;

    fn spec(name: &str, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype: DType::Uint8, shape: shape.to_vec() }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        let count = shape.iter().product();
        Tensor::new(name.into(), DType::Uint8, shape.into(), Data::Plain(Bytes::from(vec![0; count]))).unwrap()
    }

    #[test]
    fn inputs_are_put_in_order_and_checked() {
        let signature = Signature { inputs: vec![spec("a", &[-1, 2]), spec("b", &[-1])], ..Signature::default() };
        let arranged = signature.arrange("m", vec![tensor("b", &[3]), tensor("a", &[3, 2])]).unwrap();
        assert_eq!(&*arranged[0].name, "a");

        let message = |inputs| signature.arrange("m", inputs).unwrap_err().message;
        assert_eq!(message(vec![tensor("a", &[1, 2])]), "model 'm': input 'b' is missing; its inputs are 'a', 'b'");
        assert_eq!(message(vec![tensor("a", &[1, 2]), tensor("a", &[1, 2])]), "model 'm': input 'a' is given twice");
        assert_eq!(message(vec![tensor("c", &[1])]), "model 'm' has no input 'c'; its inputs are 'a', 'b'");
        assert_eq!(
            message(vec![tensor("a", &[1, 3]), tensor("b", &[1])]),
            "model 'm': input 'a' must have shape [-1, 2] (-1 is any size), got [1, 3]"
        );
    }

    #[test]
    fn text_is_given_alone_or_not_at_all() {
        let texts = |shape: &[usize]| {
            let count = shape.iter().product();
            let data = Data::Strings(vec![Bytes::from_static(b"a"); count]);
            Tensor::new("text".into(), DType::Bytes, shape.into(), data).unwrap()
        };
        let signature = |pairs: Pairs| Signature {
            inputs: vec![
                TensorSpec { name: "text".into(), dtype: DType::Bytes, shape: pairs.shape() },
                spec("ids", &[-1, -1]),
                spec("mask", &[-1, -1]),
            ],
            optional: ["text", "ids", "mask"].map(Into::into).into(),
            text: Some(pairs),
            ..Signature::default()
        };
        let of = |pairs: Pairs, inputs| signature(pairs).arrange("m", inputs).map_err(|error| error.message);
        for (pairs, taken, refused) in [
            (Pairs::Never, vec![vec![3], vec![3, 1]], vec![vec![3, 2], vec![], vec![1, 1, 1]]),
            (Pairs::Maybe, vec![vec![3], vec![3, 1], vec![3, 2]], vec![vec![3, 3]]),
            (Pairs::Always, vec![vec![3, 2]], vec![vec![3], vec![3, 1]]),
        ] {
            for shape in taken {
                assert_eq!(of(pairs, vec![texts(&shape)]).unwrap()[0].shape[..], shape[..]);
            }
            for shape in refused {
                let message = of(pairs, vec![texts(&shape)]).unwrap_err();
                assert!(message.starts_with("model 'm': input 'text' must have shape [-1"), "{message}");
            }
        }
        let ids = || tensor("ids", &[1, 2]);
        assert_eq!(of(Pairs::Never, vec![tensor("mask", &[1, 2]), ids()]).unwrap()[0].name, ids().name);
        assert_eq!(of(Pairs::Never, vec![ids()]).unwrap().len(), 1);
        let message = of(Pairs::Never, vec![texts(&[1]), ids()]).unwrap_err();
        assert!(message.contains("stands in place of the others"), "{message}");
        for none in [vec![], vec![tensor("mask", &[1, 2])]] {
            let message = of(Pairs::Never, none).unwrap_err();
            assert_eq!(message, "model 'm': input 'text' is missing, and so is 'ids'; one of them is needed");
        }
        let message = of(Pairs::Never, vec![tensor("text", &[1])]).unwrap_err();
        assert_eq!(message, "model 'm': input 'text' must be BYTES, got UINT8");
    }

    #[test]
    fn tokens_are_read_as_the_integers_that_a_graph_takes() {
        let taking = |dtype: DType, tokens: &[&str]| {
            let spec =
                |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
            let tokens = tokens.iter().map(|name| spec(name, dtype, &[-1, -1]));
            let inputs = std::iter::once(spec("text", DType::Bytes, &[-1])).chain(tokens).collect();
            Signature { inputs, text: Some(Pairs::Never), ..Signature::default() }
        };
        let long = taking(DType::Int64, &["ids", "mask"]);
        let given = |name: &str| tensor(name, &[1, 2]);
        let text = [given("text")];
        let tokens = [given("ids"), given("mask")];
        for (other, same_text, same_tokens) in [
            (taking(DType::Int64, &["ids", "mask", "types"]), true, false),
            (taking(DType::Int32, &["ids", "mask"]), true, false),
            (taking(DType::Int64, &["ids"]), true, false),
            (Signature { text: None, ..long.clone() }, false, false),
        ] {
            assert_eq!(other.is_read_like(&long, &text), same_text, "{other:?}");
            assert_eq!(other.is_read_like(&long, &tokens), same_tokens, "{other:?}");
        }
    }

    #[test]
    fn a_batch_dimension_is_needed_everywhere() {
        let signature = |inputs, outputs| Signature { inputs, outputs, ..Signature::default() };
        assert_eq!(signature(vec![spec("a", &[-1, 2])], vec![spec("y", &[-1])]).unbatchable(), None);
        assert_eq!(
            signature(vec![spec("a", &[-1, 2])], vec![spec("y", &[1])]).unbatchable().unwrap(),
            "output 'y' has the fixed first dimension 1"
        );
        assert_eq!(signature(vec![spec("a", &[])], vec![]).unbatchable().unwrap(), "input 'a' is a scalar");
    }
}
