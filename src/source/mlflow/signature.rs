//! The signature that stands in `MLmodel`: what a model takes and gives, as its author has told clients.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MAX_MLMODEL, flavor::MLMODEL};
use crate::source::yaml;

/// Fields of one list; more than any model has.
const MAX_FIELDS: usize = 10_000;

/// A signature as `MLmodel` has it: each list in MLflow's own words, null when nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ModelSignature {
    pub inputs: Option<Vec<Value>>,
    pub outputs: Option<Vec<Value>>,
    pub params: Option<Vec<Value>>,
}

/// An input or output of a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The only one of its kind may have none.
    pub name: Option<String>,
    pub required: bool,
    pub form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// NumPy's name of the type of its elements, and its shape; -1 stands for any size.
    Tensor(String, Vec<i64>),
    /// A column of a table, and MLflow's name of its type.
    Column(String),
}

impl ModelSignature {
    /// Of the version whose files lie in `files`; `None` when MLflow has not saved it, or without one.
    ///
    /// # Errors
    /// What is wrong with `MLmodel`, in words.
    pub fn find(files: &Path) -> Result<Option<Self>, String> {
        let path = files.join(MLMODEL);
        match path.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Err(format!("{MLMODEL} is no plain file")),
            Err(error) => return Err(format!("{MLMODEL}: {error}")),
        }
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_MLMODEL + 1).read_to_string(&mut text));
        read.map_err(|error| format!("{MLMODEL}: {error}"))?;
        if text.len() as u64 > MAX_MLMODEL {
            return Err(format!("{MLMODEL} has more than {MAX_MLMODEL} bytes"));
        }
        Self::parse(&text).map_err(|error| format!("{MLMODEL}: {error}"))
    }

    /// # Errors
    /// What is wrong with the text of an `MLmodel`.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let model = yaml::read(text)?;
        let Some(said) = model.get("signature").filter(|said| !said.is_null()) else { return Ok(None) };
        let list = |key: &str| match said.get(key) {
            None | Some(Value::Null) => Ok(None),
            // JSON in a text.
            Some(Value::String(json)) => {
                serde_json::from_str::<Option<Vec<Value>>>(json).map_err(|error| format!("signature.{key}: {error}"))
            }
            Some(Value::Array(list)) => Ok(Some(list.clone())),
            Some(_) => Err(format!("signature.{key}: expected a list")),
        };
        // Nothing is held against params, and a default that JSON has no number for (`NaN`) is no reason to forget the rest.
        let params = list("params").unwrap_or_default();
        Ok(Some(Self { inputs: list("inputs")?, outputs: list("outputs")?, params }))
    }

    /// # Errors
    /// What is no field.
    pub fn inputs(&self) -> Result<Vec<Field>, String> {
        fields("inputs", self.inputs.as_deref())
    }

    /// # Errors
    /// What is no field.
    pub fn outputs(&self) -> Result<Vec<Field>, String> {
        fields("outputs", self.outputs.as_deref())
    }
}

fn fields(key: &str, list: Option<&[Value]>) -> Result<Vec<Field>, String> {
    let list = list.unwrap_or_default();
    if list.len() > MAX_FIELDS {
        return Err(format!("signature.{key}: {} fields; at most {MAX_FIELDS} are read", list.len()));
    }
    let field = |(index, value)| field(value).ok_or_else(|| format!("signature.{key}: field {index} has no type"));
    list.iter().enumerate().map(field).collect()
}

fn field(value: &Value) -> Option<Field> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
    let kind = text(value, "type")?;
    let form = match value.get("tensor-spec") {
        Some(spec) if kind == "tensor" => {
            let shape = spec.get("shape")?.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>()?;
            Form::Tensor(text(spec, "dtype")?, shape)
        }
        _ => Form::Column(kind),
    };
    // Before MLflow 2.6 it was the other way round.
    let optional = value.get("optional").and_then(Value::as_bool).unwrap_or(false);
    let required = value.get("required").and_then(Value::as_bool).unwrap_or(!optional);
    Some(Field { name: text(value, "name").filter(|name| !name.is_empty()), required, form })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SAVED: &str = "
flavors:
  onnx: {data: model.onnx}
run_id: 0d1fb805a3ed487ea23ac5512d835e40
signature:
  inputs: '[{\"type\": \"tensor\", \"tensor-spec\": {\"dtype\": \"float32\", \"shape\":
    [-1, 4]}}]'
  outputs: '[{\"name\": \"label\", \"type\": \"tensor\", \"tensor-spec\": {\"dtype\": \"int64\", \"shape\": [-1]}}]'
  params: '[{\"name\": \"threshold\", \"default\": 0.5, \"shape\": null, \"type\": \"double\"}]'
utc_time_created: '2026-11-21 02:45:28.941269'
";

    #[test]
    fn a_signature_is_read_as_mlflow_writes_it() {
        let signature = ModelSignature::parse(SAVED).unwrap().unwrap();
        assert_eq!(
            serde_json::to_value(&signature).unwrap(),
            json!({
                "inputs": [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}],
                "outputs": [
                    {"name": "label", "type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}
                ],
                "params": [{"name": "threshold", "default": 0.5, "shape": null, "type": "double"}],
            })
        );
        let form = Form::Tensor("float32".to_owned(), vec![-1, 4]);
        assert_eq!(signature.inputs().unwrap(), [Field { name: None, required: true, form }]);
        assert_eq!(signature.outputs().unwrap()[0].name.as_deref(), Some("label"));

        let columns = "signature:\n  inputs: '[{\"type\": \"double\", \"name\": \"a\", \"required\": false}, \
                       {\"type\": \"string\", \"name\": \"b\"}, {\"type\": \"long\", \"optional\": true}]'\n";
        let fields = ModelSignature::parse(columns).unwrap().unwrap().inputs().unwrap();
        let shown: Vec<_> = fields.iter().map(|field| (field.name.as_deref(), field.required)).collect();
        assert_eq!(shown, [(Some("a"), false), (Some("b"), true), (None, false)]);
        assert_eq!(fields[0].form, Form::Column("double".to_owned()));
    }

    #[test]
    fn a_model_may_have_none_and_nonsense_is_told() {
        for text in ["", "flavors: {onnx: {}}", "signature: null", "signature:"] {
            assert_eq!(ModelSignature::parse(text), Ok(None), "{text}");
        }
        let empty = ModelSignature::parse("signature: {inputs: 'null', outputs: null}").unwrap().unwrap();
        assert_eq!((empty.inputs(), empty), (Ok(vec![]), ModelSignature::default()));
        let text = SAVED.replace("0.5", "NaN");
        let signature = ModelSignature::parse(&text).unwrap().unwrap();
        assert_eq!((signature.inputs().unwrap().len(), signature.params), (1, None));
        let said = |text: &str| match ModelSignature::parse(text) {
            Ok(signature) => signature.unwrap().inputs().unwrap_err(),
            Err(error) => error,
        };
        assert!(said("signature: {inputs: '['}").starts_with("signature.inputs: EOF"));
        assert_eq!(said("signature: {inputs: 3}"), "signature.inputs: expected a list");
        for field in ["{}", "3", "{type: tensor, tensor-spec: {dtype: int64}}", "{type: tensor, tensor-spec: 1}"] {
            assert_eq!(said(&format!("signature: {{inputs: [{field}]}}")), "signature.inputs: field 0 has no type");
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(ModelSignature::find(folder.path()), Ok(None));
        std::fs::write(folder.path().join(MLMODEL), SAVED).unwrap();
        assert!(ModelSignature::find(folder.path()).unwrap().is_some());
        std::fs::write(folder.path().join(MLMODEL), " ".repeat(MAX_MLMODEL as usize + 1)).unwrap();
        assert!(ModelSignature::find(folder.path()).unwrap_err().contains("more than 1048576 bytes"));
    }
}
