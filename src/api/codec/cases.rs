//! Golden cases: requests and the answers they must get, in one JSON text.
//!
//! A case is a request's `inputs` beside an answer's `outputs`, so that both can be copied from where they were seen.
//! What else stands beside them (an id, a model's name) means nothing here.

use bytes::Bytes;
use serde::de::DeserializeSeed;

use super::{
    Document,
    document::Json,
    envelope::{INPUT_MEMBERS, Objects, Place},
    json::{Tail, tensor},
    values::Spelling,
};
use crate::{
    error::{Error, abridge},
    model::golden::Case,
    tensor::Tensor,
};

/// Reads a list of cases, or the one that is the member `cases` of an object. Tensors are as in a request, with their
/// elements in `data`, and floats of 16 bits are numbers too.
///
/// # Errors
/// `InvalidArgument` naming the case by its index, and the tensor.
pub fn decode_cases(body: &Bytes) -> Result<Vec<Case>, Error> {
    let document = Document::parse_named(body, "the file")?;
    let list = match document.root().members() {
        Some(members) => find(members, "cases")?,
        None => Some(document.root()),
    };
    let items = list.and_then(Json::items);
    let items =
        items.ok_or_else(|| Error::invalid("it must be a list of cases, or an object with the list 'cases'"))?;
    let read = |(index, item)| {
        case(item).map_err(|error| Error { message: format!("cases[{index}]: {}", error.message), ..error })
    };
    items.enumerate().map(read).collect()
}

fn case(json: Json<'_>) -> Result<Case, Error> {
    let list = |name: &'static str| {
        let members =
            json.members().ok_or_else(|| Error::invalid(format!("must be an object, got {}", json.shown())))?;
        let list = find(members, name)?.ok_or_else(|| Error::invalid(format!("has no '{name}'")))?;
        tensors(name, list)
    };
    Ok(Case { inputs: list("inputs")?, outputs: list("outputs")? })
}

/// The value of the member `name`; null counts as none.
fn find<'a>(
    mut members: impl Iterator<Item = Result<(std::borrow::Cow<'a, str>, Json<'a>), Error>>,
    name: &str,
) -> Result<Option<Json<'a>>, Error> {
    let mut found = None;
    members.try_for_each(|member| {
        let (member, value) = member?;
        match member == name && !value.is_null() && found.replace(value).is_some() {
            true => Err(Error::invalid(format!("has '{name}' twice"))),
            false => Ok(()),
        }
    })?;
    Ok(found)
}

fn tensors(list: &'static str, json: Json<'_>) -> Result<Vec<Tensor>, Error> {
    let mut deserializer = serde_json::Deserializer::from_str(json.text());
    let objects = Objects(list, &INPUT_MEMBERS).deserialize(&mut deserializer).map_err(|error| {
        // The position counts from where the list starts, which helps nobody.
        let message = error.to_string();
        let end = message.rfind(" at line ").unwrap_or(message.len());
        Error::invalid(abridge(&message[..end]))
    })?;
    let read = |(index, members)| {
        let mut placed = Vec::new();
        let place = Place(list, index);
        tensor(place, members, Spelling::Plain, &mut Tail::none(), json.source(), &mut placed)?
            .ok_or_else(|| Error::invalid(format!("{place} lies in shared memory, which a file cannot")))
    };
    objects.iter().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{DType, Data};

    const CASE: &str = r#"{"id": "7", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, NaN]}],
        "model_name": "m", "outputs": [{"name": "y", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}"#;

    fn decode(text: &str) -> Result<Vec<Case>, String> {
        decode_cases(&Bytes::copy_from_slice(text.as_bytes())).map_err(|error| error.message)
    }

    #[test]
    fn cases_are_read_in_the_words_of_the_protocol() {
        for text in [format!("[{CASE}, {CASE}]"), format!(r#"{{"note": 1, "cases": [{CASE}, {CASE}]}}"#)] {
            let cases = decode(&text).unwrap();
            assert_eq!(cases.len(), 2);
            let (input, output) = (&cases[1].inputs[0], &cases[1].outputs[0]);
            assert_eq!((&*input.name, input.dtype, &input.shape[..]), ("x", DType::Fp32, &[1, 2][..]));
            assert_eq!(output.data, Data::Strings(vec![Bytes::from("a")]));
        }
        assert_eq!(decode("[]").unwrap().len(), 0);
        let halves = decode(&format!("[{}]", CASE.replace("FP32", "FP16").replace("NaN", "0.5"))).unwrap();
        assert_eq!(halves[0].inputs[0].data, Data::Plain(Bytes::from_static(&[0, 0x3c, 0, 0x38])));
    }

    #[test]
    fn mistakes_name_the_case_and_the_tensor() {
        let with = |from: &str, to: &str| format!("[{CASE}, {}]", CASE.replacen(from, to, 1));
        for (text, words) in [
            ("[1,".to_owned(), ["the file is not the JSON", "line 1"]),
            ("3".to_owned(), ["list of cases", "'cases'"]),
            (CASE.to_owned(), ["list of cases", "'cases'"]),
            (r#"{"cases": 1}"#.to_owned(), ["list of cases", "'cases'"]),
            ("[[]]".to_owned(), ["cases[0]", "must be an object, got []"]),
            (with("inputs", "input"), ["cases[1]", "has no 'inputs'"]),
            (with("outputs", "inputs"), ["cases[1]", "'inputs' twice"]),
            (with("outputs", "output"), ["cases[1]", "has no 'outputs'"]),
            (with("\"a\"", "1"), ["cases[1]: output 'y'", "element 0 must be a string, got 1"]),
            (with("NaN", "true"), ["cases[1]: input 'x'", "element 1 must be a number"]),
            (with("[1, NaN]", "[1]"), ["cases[1]: input 'x'", "takes 2 elements"]),
            (with("\"BYTES\"", "\"TEXT\""), ["cases[1]: output 'y'", "datatype 'TEXT'"]),
            (with("\"shape\": [1],", ""), ["cases[1]", "outputs[0] has no 'shape'"]),
            (
                with("\"data\": [1, NaN]", "\"parameters\": {\"binary_data_size\": 8}"),
                ["cases[1]: input 'x'", "8 bytes"],
            ),
            (
                with(
                    "\"data\": [1, NaN]",
                    r#""parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}"#,
                ),
                ["cases[1]: inputs[0]", "shared memory"],
            ),
        ] {
            let message = decode(&text).unwrap_err();
            assert!(words.iter().all(|word| message.contains(word)), "{text}: {message}");
        }
    }
}
