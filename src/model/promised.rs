//! Whether a graph takes and gives what MLflow's signature has promised of it.
//!
//! What a client would be refused that does as it was told is a mismatch, and so is an output that clients look for and
//! do not get. What MLflow itself puts up with when it serves the same model is noted: doubles for a graph of floats, and
//! what the signature says of outputs without naming them, which is what another model gave before it became this graph.

use crate::{
    backend::{Interface, Pairs, Signature, TensorSpec},
    error::{Error, shorten},
    source::{Field, Form, ModelSignature},
    tensor::DType,
};

/// MLflow's types of columns that have one value a row. Others, of arrays or vectors, may have any shape.
const SCALARS: [&str; 8] = ["boolean", "integer", "long", "float", "double", "string", "binary", "datetime"];
/// Names in one note.
const MOST_NAMED: usize = 5;

/// What operators should know, when nothing is wrong.
///
/// # Errors
/// `InvalidArgument` naming the field, what was promised of it, and what the graph has.
pub fn check(promised: &ModelSignature, graph: &Signature, interface: &Interface) -> Result<Vec<String>, Error> {
    let unread = |reason: String| vec![format!("MLflow's signature is not checked: {reason}")];
    let (inputs, outputs) = match (promised.inputs(), promised.outputs()) {
        (Ok(inputs), Ok(outputs)) => (inputs, outputs),
        (Err(reason), _) | (_, Err(reason)) => return Ok(unread(reason)),
    };
    let mut notes = Vec::new();
    let checked = check_inputs(&inputs, graph, &mut notes).and_then(|()| {
        let is_all = interface.outputs.is_empty();
        outputs.iter().try_for_each(|output| check_output(output, graph, is_all, &mut notes))
    });
    checked.map_err(|reason| {
        Error::invalid(format!(
            "MLflow's signature does not fit the graph: {reason} (check_signature = false in model.toml serves it all the \
             same)"
        ))
    })?;
    Ok(notes)
}

fn check_inputs(inputs: &[Field], graph: &Signature, notes: &mut Vec<String>) -> Result<(), String> {
    if inputs.is_empty() {
        return Ok(());
    }
    let is_tensor = |field: &Field| matches!(field.form, Form::Tensor(..));
    if !inputs.iter().all(is_tensor) {
        return check_columns(inputs, graph, notes);
    }
    let needed: Vec<&TensorSpec> = needed(graph).collect();
    for field in inputs {
        let Form::Tensor(dtype, shape) = &field.form else { continue };
        let spec = match &field.name {
            Some(name) => graph.inputs.iter().find(|spec| *spec.name == **name),
            None => match needed.as_slice() {
                [only] => Some(*only),
                _ => {
                    let given = named(graph.inputs.iter().map(|spec| &*spec.name));
                    return Err(format!("it has an input without a name, and the graph's inputs are {given}"));
                }
            },
        };
        match (spec, &field.name) {
            (Some(spec), _) => {
                notes.extend(difference("input", dtype, shape, spec)?);
            }
            (None, Some(name)) if graph.defaults.iter().any(|spec| *spec.name == **name) => notes.push(format!(
                "input '{}' of MLflow's signature has a value in the graph; clients may give it when model.toml declares it \
                 (inputs, optional = true)",
                shorten(name)
            )),
            (None, Some(name)) if field.required => {
                let given = named(graph.inputs.iter().map(|spec| &*spec.name));
                return Err(format!("it has an input '{}', and the graph's inputs are {given}", shorten(name)));
            }
            (None, _) => {}
        }
    }
    let has =
        |spec: &TensorSpec| inputs.iter().any(|field| field.name.as_deref().is_none_or(|name| name == &*spec.name));
    match needed.into_iter().find(|spec| !has(spec)) {
        Some(spec) => {
            let given = named(inputs.iter().filter_map(|field| field.name.as_deref()));
            Err(format!("the graph has an input '{}', and the signature's are {given}", spec.name))
        }
        None => Ok(()),
    }
}

/// The columns of a table, which become inputs as `api/shapes/table.rs` has it: by name when there is one for every input,
/// else together the rows of the only input.
fn check_columns(columns: &[Field], graph: &Signature, notes: &mut Vec<String>) -> Result<(), String> {
    let kind = |field: &Field| match &field.form {
        Form::Column(kind) => kind.clone(),
        Form::Tensor(dtype, _) => dtype.clone(),
    };
    let find = |name: &str| columns.iter().find(|column| column.name.as_deref() == Some(name));
    let needed: Vec<&TensorSpec> = match (graph.text, &graph.inputs[..]) {
        (Some(_), [text, tokens, ..]) if find(&text.name).is_some() || find(&tokens.name).is_none() => vec![text],
        _ => needed(graph).collect(),
    };
    if needed.iter().all(|spec| find(&spec.name).is_some()) {
        for spec in &graph.inputs {
            let Some(column) = find(&spec.name) else { continue };
            let is_scalar = matches!(&column.form, Form::Column(kind) if SCALARS.contains(&kind.as_str()));
            if is_scalar && !matches!(spec.shape[..], [_] | [_, -1 | 1]) {
                return Err(format!(
                    "input '{}' is a column of {}, and the graph has {} {:?}",
                    spec.name,
                    shorten(&kind(column)),
                    spec.dtype,
                    spec.shape
                ));
            }
            check_kinds(&[column], spec, notes)?;
        }
        let is_known = |name: &str| graph.inputs.iter().any(|spec| *spec.name == *name);
        let unused = columns.iter().filter_map(|column| column.name.as_deref()).filter(|name| !is_known(name));
        let unused: Vec<&str> = unused.collect();
        if !unused.is_empty() {
            notes.push(format!("columns of MLflow's signature that are no inputs: {}", named(unused.into_iter())));
        }
        return Ok(());
    }
    let [spec] = needed.as_slice() else {
        let missing = needed.iter().find(|spec| find(&spec.name).is_none()).map_or("", |spec| &*spec.name);
        let given = named(columns.iter().filter_map(|column| column.name.as_deref()));
        return Err(format!("the graph has an input '{missing}', and the signature's columns are {given}"));
    };
    let fewest = columns.iter().filter(|column| column.required).count();
    let counts = fewest..=columns.len();
    let fits = match spec.shape[..] {
        [_, -1] => true,
        [_, width] => usize::try_from(width).is_ok_and(|width| counts.contains(&width)),
        [_] => counts.contains(&1) || (graph.text == Some(Pairs::Maybe) && counts.contains(&2)),
        _ => false,
    };
    if !fits {
        return Err(format!(
            "it has {} columns ({}), and the graph's input '{}' has {} {:?}",
            columns.len(),
            named(columns.iter().map(|column| column.name.as_deref().unwrap_or("unnamed"))),
            spec.name,
            spec.dtype,
            spec.shape
        ));
    }
    check_kinds(&columns.iter().collect::<Vec<_>>(), spec, notes)
}

/// Whether elements of `spec` can be made of what the columns hold.
fn check_kinds(columns: &[&Field], spec: &TensorSpec, notes: &mut Vec<String>) -> Result<(), String> {
    let is_text = spec.dtype == DType::Bytes;
    let (mut cast, mut unknown) = (Vec::new(), Vec::new());
    for column in columns {
        let Form::Column(kind) = &column.form else { continue };
        let name = column.name.as_deref().unwrap_or("unnamed");
        let dtype = match kind.as_str() {
            "boolean" => DType::Bool,
            "integer" => DType::Int32,
            "long" => DType::Int64,
            "float" => DType::Fp32,
            "double" => DType::Fp64,
            "string" | "binary" => DType::Bytes,
            _ => {
                unknown.push(name);
                continue;
            }
        };
        if (dtype == DType::Bytes) != is_text {
            return Err(format!(
                "column '{}' is {kind}, and the graph's input '{}' has {}",
                shorten(name),
                spec.name,
                spec.dtype
            ));
        }
        if dtype != spec.dtype {
            cast.push(format!("{} {kind}", shorten(name)));
        }
    }
    if !cast.is_empty() {
        let cast = named(cast.iter().map(String::as_str));
        notes
            .push(format!("columns of MLflow's signature that become {} in input '{}': {cast}", spec.dtype, spec.name));
    }
    if !unknown.is_empty() {
        let unknown = named(unknown.into_iter());
        notes.push(format!("columns of MLflow's signature whose type is not checked: {unknown}"));
    }
    Ok(())
}

/// `is_all` says whether clients see all that the graph gives.
fn check_output(output: &Field, graph: &Signature, is_all: bool, notes: &mut Vec<String>) -> Result<(), String> {
    let find = |name: &str| graph.outputs.iter().find(|spec| *spec.name == *name);
    match (&output.form, &output.name) {
        (Form::Tensor(dtype, shape), Some(name)) => match find(name) {
            Some(spec) => {
                notes.extend(difference("output", dtype, shape, spec)?);
                Ok(())
            }
            None if !output.required || !is_all => Ok(()),
            None => {
                let given = named(graph.outputs.iter().map(|spec| &*spec.name));
                Err(format!("it has an output '{}', and the graph's outputs are {given}", shorten(name)))
            }
        },
        (Form::Tensor(dtype, shape), None) => {
            match graph.outputs.as_slice() {
                [only] => notes.extend(difference("output", dtype, shape, only).unwrap_or_else(Some)),
                outputs => notes.push(format!(
                    "MLflow's signature does not say which output it means; the graph's are {}",
                    named(outputs.iter().map(|spec| &*spec.name))
                )),
            }
            Ok(())
        }
        (Form::Column(_), Some(name)) if is_all && find(name).is_none() => {
            let given = named(graph.outputs.iter().map(|spec| &*spec.name));
            notes.push(format!(
                "MLflow's signature has an output '{}', and the graph's outputs are {given}",
                shorten(name)
            ));
            Ok(())
        }
        (Form::Column(_), _) => Ok(()),
    }
}

/// What is to be noted of a tensor.
///
/// # Errors
/// What was promised of it and what the graph has, when one is not the other.
fn difference(kind: &str, dtype: &str, shape: &[i64], spec: &TensorSpec) -> Result<Option<String>, String> {
    let name = &spec.name;
    let said = format!(
        "{kind} '{name}' is {} {shape:?}, and the graph has {} {:?} (-1 is any size)",
        shorten(dtype),
        spec.dtype,
        spec.shape
    );
    let alike = |(promised, has): (&i64, &i64)| *promised < 0 || *has < 0 || promised == has;
    let fits = shape.len() == spec.shape.len() && shape.iter().zip(&spec.shape).all(alike);
    let is_output = kind == "output";
    if !(fits || is_output) {
        return Err(said);
    }
    let noted = || Some(format!("in MLflow's signature, {said}"));
    // Of some outputs the graph does not say the shape, of others not exactly; what it gives may be what was promised.
    let is_odd = !(fits || spec.shape.is_empty());
    match of_numpy(dtype) {
        None if is_odd => Ok(noted()),
        None => {
            Ok(Some(format!("the type of {kind} '{name}' in MLflow's signature, {}, is not checked", shorten(dtype))))
        }
        Some(promised) if promised == spec.dtype => Ok(noted().filter(|_| is_odd)),
        // What MLflow casts itself.
        Some(DType::Fp64) if spec.dtype == DType::Fp32 => Ok(noted()),
        Some(_) => Err(said),
    }
}

/// NumPy's name of a type.
fn of_numpy(name: &str) -> Option<DType> {
    Some(match name {
        "bool" => DType::Bool,
        "uint8" => DType::Uint8,
        "uint16" => DType::Uint16,
        "uint32" => DType::Uint32,
        "uint64" => DType::Uint64,
        "int8" => DType::Int8,
        "int16" => DType::Int16,
        "int32" => DType::Int32,
        "int64" => DType::Int64,
        "float16" => DType::Fp16,
        "bfloat16" => DType::Bf16,
        "float32" => DType::Fp32,
        "float64" => DType::Fp64,
        "str" | "bytes" | "object" => DType::Bytes,
        _ => return None,
    })
}

/// The inputs that every request has to give.
fn needed(graph: &Signature) -> impl Iterator<Item = &TensorSpec> {
    graph.inputs.iter().filter(|spec| !graph.is_optional(&spec.name))
}

/// Some names, for people.
fn named<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let mut text: Vec<String> = names.iter().take(MOST_NAMED).map(|name| format!("'{}'", shorten(name))).collect();
    match names.len() {
        0 => text.push("none".to_owned()),
        count if count > MOST_NAMED => text.push(format!("{} more", count - MOST_NAMED)),
        _ => {}
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(name: &str, dtype: DType, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// X [-1, 4] → label [-1], scores [-1, 3]; `bias` has a value.
    fn iris() -> Signature {
        Signature {
            inputs: vec![spec("X", DType::Fp32, &[-1, 4])],
            outputs: vec![spec("label", DType::Int64, &[-1]), spec("scores", DType::Fp32, &[-1, 3])],
            defaults: vec![spec("bias", DType::Fp32, &[1])],
            ..Signature::default()
        }
    }

    fn tensor(name: &str, dtype: &str, shape: &[i64]) -> Value {
        let spec = json!({"dtype": dtype, "shape": shape});
        if name.is_empty() {
            return json!({"type": "tensor", "tensor-spec": spec});
        }
        json!({"name": name, "type": "tensor", "tensor-spec": spec})
    }

    fn column(name: &str, kind: &str) -> Value {
        json!({"name": name, "type": kind, "required": true})
    }

    fn inputs(graph: &Signature, inputs: Vec<Value>) -> Result<String, String> {
        let promised = ModelSignature { inputs: Some(inputs), ..ModelSignature::default() };
        told(check(&promised, graph, &Interface::default()))
    }

    fn outputs(outputs: Vec<Value>) -> Result<String, String> {
        let promised = ModelSignature { outputs: Some(outputs), ..ModelSignature::default() };
        told(check(&promised, &iris(), &Interface::default()))
    }

    /// What is noted, or wrong.
    fn told(result: Result<Vec<String>, Error>) -> Result<String, String> {
        let between = |error: Error| {
            let text = error.message.strip_prefix("MLflow's signature does not fit the graph: ").unwrap().to_owned();
            text.strip_suffix(" (check_signature = false in model.toml serves it all the same)").unwrap().to_owned()
        };
        result.map(|notes| notes.join("; ")).map_err(between)
    }

    #[test]
    fn tensors_are_held_against_the_inputs_of_their_names() {
        let iris = iris();
        let one = |field| inputs(&iris, vec![field]);
        for fits in [
            tensor("", "float32", &[-1, 4]),
            tensor("X", "float32", &[-1, 4]),
            tensor("X", "float32", &[-1, -1]),
            tensor("X", "float32", &[8, 4]),
        ] {
            assert_eq!(one(fits.clone()), Ok(String::new()), "{fits}");
        }
        let graph = "and the graph has FP32 [-1, 4] (-1 is any size)";
        assert_eq!(one(tensor("", "float32", &[-1, 5])), Err(format!("input 'X' is float32 [-1, 5], {graph}")));
        assert_eq!(one(tensor("X", "int64", &[-1, 4])), Err(format!("input 'X' is int64 [-1, 4], {graph}")));
        assert_eq!(one(tensor("X", "float32", &[4])), Err(format!("input 'X' is float32 [4], {graph}")));
        assert_eq!(
            one(tensor("Y", "float32", &[-1, 4])),
            Err("it has an input 'Y', and the graph's inputs are 'X'".into())
        );
        // MLflow casts it.
        let noted = format!("in MLflow's signature, input 'X' is float64 [-1, 4], {graph}");
        assert_eq!(one(tensor("", "float64", &[-1, 4])), Ok(noted));
        assert!(one(tensor("X", "datetime64[ns]", &[-1, 4])).unwrap().contains("datetime64[ns], is not checked"));
        let with_bias = vec![tensor("X", "float32", &[-1, 4]), tensor("bias", "float32", &[1])];
        assert!(inputs(&iris, with_bias).unwrap().contains("model.toml declares it"));
        assert_eq!(inputs(&iris, vec![]), Ok(String::new()));
    }

    #[test]
    fn each_input_of_several_needs_a_name() {
        let inputs_of = |names: [&str; 2]| names.map(|name| spec(name, DType::Int32, &[-1])).to_vec();
        let graph = Signature { inputs: inputs_of(["a", "b"]), ..Signature::default() };
        let [a, b] = ["a", "b"].map(|name| tensor(name, "int32", &[-1]));
        assert_eq!(inputs(&graph, vec![b, a.clone()]), Ok(String::new()));
        let said = "the graph has an input 'b', and the signature's are 'a'";
        assert_eq!(inputs(&graph, vec![a]), Err(said.to_owned()));
        let said = "it has an input without a name, and the graph's inputs are 'a', 'b'";
        assert_eq!(inputs(&graph, vec![tensor("", "int32", &[-1])]), Err(said.to_owned()));
        let graph = Signature { optional: vec!["b".into()], ..graph };
        assert_eq!(inputs(&graph, vec![tensor("", "int32", &[-1])]), Ok(String::new()));

        let said = inputs(&graph, vec![column("c", "long")]).unwrap();
        assert_eq!(said, "columns of MLflow's signature that become INT32 in input 'a': 'c long'");
        let graph = Signature { optional: vec![], ..graph };
        let said = "the graph has an input 'b', and the signature's columns are 'a', 'c'";
        assert_eq!(inputs(&graph, vec![column("a", "integer"), column("c", "integer")]), Err(said.to_owned()));
        let columns = vec![column("b", "integer"), column("a", "integer"), column("c", "integer")];
        assert_eq!(inputs(&graph, columns), Ok("columns of MLflow's signature that are no inputs: 'c'".to_owned()));
    }

    #[test]
    fn columns_are_the_rows_of_the_only_input() {
        let columns = |kinds: [&'static str; 4]| {
            ["a", "b", "c", "d"].into_iter().zip(kinds).map(|(name, kind)| column(name, kind))
        };
        let checked = |kinds| inputs(&iris(), columns(kinds).collect());
        assert_eq!(checked(["float"; 4]), Ok(String::new()));
        let noted = "columns of MLflow's signature that become FP32 in input 'X': 'b double', 'd long'";
        assert_eq!(checked(["float", "double", "float", "long"]), Ok(noted.to_owned()));
        let said = "column 'c' is string, and the graph's input 'X' has FP32";
        assert_eq!(checked(["double", "double", "string", "double"]), Err(said.to_owned()));
        assert!(checked(["float", "float", "float", "datetime"]).unwrap().ends_with("not checked: 'd'"));
        let said = "it has 3 columns ('a', 'b', 'c'), and the graph's input 'X' has FP32 [-1, 4]";
        assert_eq!(inputs(&iris(), columns(["float"; 4]).take(3).collect()), Err(said.to_owned()));
        // One that may be missing may make up the number.
        let mut five: Vec<Value> = columns(["float"; 4]).collect();
        five.push(json!({"name": "e", "type": "float", "required": false}));
        assert_eq!(inputs(&iris(), five), Ok(String::new()));
        let texts = Signature { inputs: vec![spec("text", DType::Bytes, &[-1])], ..Signature::default() };
        assert_eq!(inputs(&texts, vec![column("any", "string")]), Ok(String::new()));
        assert!(inputs(&texts, vec![column("text", "double")]).is_err());
        // A model that takes text or tokens.
        let inputs_of = vec![spec("text", DType::Bytes, &[-1]), spec("input_ids", DType::Int64, &[-1, -1])];
        let optional = inputs_of.iter().map(|spec| spec.name.clone()).collect();
        let encoder =
            Signature { inputs: inputs_of, optional, text: Some(crate::backend::Pairs::Never), ..Signature::default() };
        for name in ["text", "any"] {
            assert_eq!(inputs(&encoder, vec![column(name, "string")]), Ok(String::new()));
            assert!(inputs(&encoder, vec![column(name, "double")]).is_err());
        }
        assert!(inputs(&encoder, vec![column("a", "string"), column("b", "string")]).is_err());
        assert!(inputs(&encoder, vec![column("input_ids", "array")]).unwrap().ends_with("not checked: 'input_ids'"));
        // A column of a name is one number a row.
        let said = "input 'X' is a column of float, and the graph has FP32 [-1, 4]";
        assert_eq!(inputs(&iris(), vec![column("X", "float")]), Err(said.to_owned()));
        // Of a list or a vector it is as many as there are.
        for kind in ["array", "sparkml-vector"] {
            let noted = "columns of MLflow's signature whose type is not checked: 'X'";
            assert_eq!(inputs(&iris(), vec![column("X", kind)]), Ok(noted.to_owned()));
        }
        let image = vec![tensor("X", "float32", &[-1, 4]), column("other", "string")];
        assert!(inputs(&iris(), image).is_ok());
    }

    #[test]
    fn outputs_are_held_against_those_of_their_names() {
        let both = vec![tensor("label", "int64", &[-1]), tensor("scores", "float32", &[-1, 3])];
        assert_eq!(outputs(both), Ok(String::new()));
        assert!(outputs(vec![tensor("scores", "float64", &[-1, 3])]).unwrap().contains("is float64"));
        let said = "output 'label' is float32 [-1], and the graph has INT64 [-1] (-1 is any size)";
        assert_eq!(outputs(vec![tensor("label", "float32", &[-1])]), Err(said.to_owned()));
        // Graphs are not exact about them.
        let noted = "in MLflow's signature, output 'scores' is float32 [-1, 1], and the graph has FP32 [-1, 3] (-1 is any \
                     size)";
        assert_eq!(outputs(vec![tensor("scores", "float32", &[-1, 1])]), Ok(noted.to_owned()));
        assert!(outputs(vec![tensor("label", "float32", &[-1, 1])]).is_err());
        let said = "it has an output 'y', and the graph's outputs are 'label', 'scores'";
        assert_eq!(outputs(vec![tensor("y", "int64", &[-1])]), Err(said.to_owned()));
        assert!(outputs(vec![tensor("", "int64", &[-1])]).unwrap().contains("which output it means"));
        assert!(outputs(vec![column("y", "double")]).unwrap().contains("has an output 'y'"));
        assert_eq!(outputs(vec![json!({"type": "string"})]), Ok(String::new()));

        // What its author leaves out was not forgotten.
        let declared = crate::backend::Declaration { name: "label".to_owned(), ..Default::default() };
        let interface = Interface { outputs: vec![declared], ..Interface::default() };
        let graph = Signature { outputs: iris().outputs[..1].to_vec(), ..iris() };
        let outputs = Some(vec![tensor("scores", "float32", &[-1, 3])]);
        let promised = ModelSignature { outputs, ..ModelSignature::default() };
        assert_eq!(check(&promised, &graph, &interface), Ok(vec![]));
        // One output, of which the signature is another's.
        let outputs = Some(vec![tensor("", "float64", &[-1])]);
        let promised = ModelSignature { outputs, ..ModelSignature::default() };
        let graph = Signature { outputs: iris().outputs[1..].to_vec(), ..iris() };
        assert!(check(&promised, &graph, &Interface::default()).unwrap()[0].contains("is float64 [-1], and the graph"));
    }

    #[test]
    fn what_is_no_signature_is_noted() {
        let promised = ModelSignature { inputs: Some(vec![json!({})]), ..ModelSignature::default() };
        let said = "MLflow's signature is not checked: signature.inputs: field 0 has no type";
        assert_eq!(check(&promised, &iris(), &Interface::default()), Ok(vec![said.to_owned()]));
    }
}
