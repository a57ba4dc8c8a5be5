//! The requests of text-embeddings-inference: embed, from texts to vectors, and rerank, from pairs to scores.

use bytes::Bytes;
use serde::Serialize;

use super::{
    members,
    texts::{self, Asked, Input, Kind},
};
use crate::{
    api::codec::{Document, InferReply, Json, NonFinite, Spelling, put_json, write_nested},
    backend::Signature,
    error::{Code, Error},
    tensor::Tensor,
};

/// A request for vectors.
#[derive(Debug)]
pub struct Embed {
    model: Option<String>,
    inputs: Input,
    truncate: Option<bool>,
    /// Whether every vector shall have the length 1.
    normalize: bool,
    dimensions: Option<usize>,
}

/// A request for the order of texts.
#[derive(Debug)]
pub struct Rerank {
    model: Option<String>,
    query: Bytes,
    texts: Vec<Bytes>,
    truncate: Option<bool>,
    return_text: bool,
}

#[derive(Serialize)]
struct Rank<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    score: f32,
}

impl Asked for Embed {
    const KIND: Kind = Kind::Embedding;

    fn read(document: &Document, limit: usize) -> Result<Self, Error> {
        let names = ["inputs", "truncate", "truncation_direction", "normalize", "prompt_name", "dimensions", "model"];
        let [inputs, truncate, direction, normalize, prompt, dimensions, model] =
            members("the request", document.root(), names)?;
        let inputs = inputs.ok_or_else(|| Error::invalid("the request has no 'inputs'"))?;
        check_direction(direction)?;
        if let Some(prompt) = prompt {
            let got = prompt.shown();
            return Err(elsewhere(format!("prompt_name must be absent, as the model's own prompt counts, got {got}")));
        }
        Ok(Self {
            model: texts::model(model)?,
            truncate: texts::flag("truncate", truncate)?,
            normalize: texts::flag("normalize", normalize)?.unwrap_or(true),
            dimensions: texts::dimensions(dimensions)?,
            inputs: Input::read("inputs", inputs, limit)?,
        })
    }

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn rows(&self) -> usize {
        self.inputs.rows()
    }

    fn truncate(&self) -> Option<bool> {
        self.truncate
    }

    fn tensors(&self, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
        texts::check_dimensions(self.dimensions, signature)?;
        self.inputs.tensors(signature, limit)
    }

    fn write(&self, reply: &InferReply<'_>, _: u64, non_finite: NonFinite) -> Result<Vec<u8>, Error> {
        let (vectors, _) = texts::output(reply, Self::KIND, self.rows())?;
        if !self.normalize && texts::are_unit(vectors) {
            return Err(elsewhere("its vectors are normalized, and 'normalize': false cannot undo that".to_owned()));
        }
        let vectors = texts::shaped(vectors, self.dimensions, self.normalize)?;
        let mut json = Vec::new();
        write_nested(&vectors, None, Spelling::Plain, non_finite, &mut json)?;
        Ok(json)
    }
}

impl Asked for Rerank {
    const KIND: Kind = Kind::Rerank;

    fn read(document: &Document, limit: usize) -> Result<Self, Error> {
        let names = ["query", "texts", "truncate", "truncation_direction", "raw_scores", "return_text", "model"];
        let [query, list, truncate, direction, raw, return_text, model] =
            members("the request", document.root(), names)?;
        let query = query.ok_or_else(|| Error::invalid("the request has no 'query'"))?;
        let list = list.ok_or_else(|| Error::invalid("the request has no 'texts'"))?;
        check_direction(direction)?;
        if texts::flag("raw_scores", raw)? == Some(true) {
            return Err(elsewhere("raw_scores must be false: scores are as the model's own settings say".to_owned()));
        }
        Ok(Self {
            model: texts::model(model)?,
            truncate: texts::flag("truncate", truncate)?,
            return_text: texts::flag("return_text", return_text)?.unwrap_or(false),
            query: texts::text("query", query)?,
            texts: texts::texts("texts", list, limit)?,
        })
    }

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn rows(&self) -> usize {
        self.texts.len()
    }

    fn truncate(&self) -> Option<bool> {
        self.truncate
    }

    fn tensors(&self, _: &Signature, _: usize) -> Result<Vec<Tensor>, Error> {
        texts::pairs(&self.query, &self.texts)
    }

    fn write(&self, reply: &InferReply<'_>, _: u64, _: NonFinite) -> Result<Vec<u8>, Error> {
        let (_, scores) = texts::output(reply, Self::KIND, self.rows())?;
        let scores = scores.as_chunks().0.iter().map(|&score| f32::from_le_bytes(score));
        let mut ranks: Vec<Rank<'_>> = self
            .texts
            .iter()
            .zip(scores)
            .enumerate()
            .map(|(index, (text, score))| {
                // It came in JSON.
                let text = self.return_text.then(|| std::str::from_utf8(text).unwrap_or_default());
                Rank { index, text, score }
            })
            .collect();
        if let Some(Rank { index, score, .. }) = ranks.iter().find(|rank| !rank.score.is_finite()) {
            return Err(Error::internal(format!("the score of texts[{index}] is {score}, which has no rank")));
        }
        // Equal ones stay in their order.
        ranks.sort_by(|one, other| other.score.total_cmp(&one.score));
        let mut json = Vec::new();
        put_json(&mut json, &ranks)?;
        Ok(json)
    }
}

/// What can be had from that server only.
fn elsewhere(message: String) -> Error {
    Error::new(Code::Unimplemented, message)
}

/// Texts that are too long lose their end here, not their beginning.
fn check_direction(value: Option<Json<'_>>) -> Result<(), Error> {
    let Some(value) = value else { return Ok(()) };
    if value.string().is_some_and(|direction| direction.eq_ignore_ascii_case("right")) {
        return Ok(());
    }
    Err(elsewhere(format!("truncation_direction must be 'Right', got {}", value.shown())))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::tensor::{DType, Data};

    fn read<T: Asked>(body: &Value) -> Result<T, Error> {
        T::read(&Document::parse(&Bytes::from(body.to_string())).unwrap(), 1 << 20)
    }

    fn written<T: Asked>(body: &Value, shape: &[usize], numbers: &[f32]) -> Result<Value, Error> {
        let data = Data::Plain(numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
        let outputs = [Tensor::new(T::KIND.output().into(), DType::Fp32, shape.into(), data).unwrap()];
        let reply = InferReply { model: "m", version: "1", id: "", outputs: &outputs };
        let json = read::<T>(body).unwrap().write(&reply, 0, NonFinite::Literal)?;
        Ok(serde_json::from_slice(&json).unwrap())
    }

    fn refused<T: Asked>(body: &Value) -> (Code, String) {
        let error = read::<T>(body).map(|_| ()).unwrap_err();
        (error.code, error.message)
    }

    #[test]
    fn vectors_have_the_length_that_is_wanted() {
        let numbers = [3.0, 4.0, 0.0, 0.0];
        let plain = json!({ "inputs": ["a", "b"], "normalize": false, "truncate": true });
        assert_eq!(written::<Embed>(&plain, &[2, 2], &numbers).unwrap(), json!([[3.0, 4.0], [0.0, 0.0]]));
        assert_eq!(read::<Embed>(&plain).unwrap().truncate(), Some(true));
        let unit = json!({ "inputs": ["a", "b"], "prompt_name": null, "truncation_direction": "Right" });
        assert_eq!(written::<Embed>(&unit, &[2, 2], &numbers).unwrap(), json!([[0.6, 0.8], [0.0, 0.0]]));
        let error = written::<Embed>(&plain, &[2, 2], &[0.0, 1.0, 1.0, 0.0]).unwrap_err();
        assert_eq!((error.code, error.message.contains("'normalize': false")), (Code::Unimplemented, true));
    }

    #[test]
    fn the_best_texts_come_first() {
        let mut body = json!({ "query": "q", "texts": ["a", "b", "c"] });
        assert_eq!(
            written::<Rerank>(&body, &[3], &[0.25, -1.5, 0.25]).unwrap(),
            json!([
                { "index": 0, "score": 0.25 },
                { "index": 2, "score": 0.25 },
                { "index": 1, "score": -1.5 },
            ])
        );
        body["return_text"] = json!(true);
        let ranks = written::<Rerank>(&body, &[3], &[0.0, 1.0, 0.5]).unwrap();
        assert_eq!(ranks[0], json!({ "index": 1, "text": "b", "score": 1.0 }));
        let error = written::<Rerank>(&body, &[3], &[0.0, f32::NAN, 0.5]).unwrap_err();
        assert_eq!(error.message, "the score of texts[1] is NaN, which has no rank");
    }

    #[test]
    fn pairs_have_the_query_in_front() {
        let body = json!({ "query": "q", "texts": ["a", "b"] });
        let tensors = read::<Rerank>(&body).unwrap().tensors(&Signature::default(), 1 << 20).unwrap();
        assert_eq!((&*tensors[0].name, &tensors[0].shape[..]), ("text", &[2, 2][..]));
        assert_eq!(tensors[0].data, Data::Strings(["q", "a", "q", "b"].map(Bytes::from).to_vec()));
    }

    #[test]
    fn refusals_name_the_member() {
        let invalid = |message: &str| (Code::InvalidArgument, message.to_owned());
        let absent = |message: &str| (Code::Unimplemented, message.to_owned());
        for (body, expected) in [
            (json!({}), invalid("the request has no 'inputs'")),
            (json!({ "inputs": "a", "truncate": 1 }), invalid("truncate must be true or false, got 1")),
            (json!({ "inputs": "a", "normalize": "no" }), invalid("normalize must be true or false, got \"no\"")),
            (
                json!({ "inputs": "a", "prompt_name": "query" }),
                absent("prompt_name must be absent, as the model's own prompt counts, got \"query\""),
            ),
            (
                json!({ "inputs": "a", "truncation_direction": "Left" }),
                absent("truncation_direction must be 'Right', got \"Left\""),
            ),
        ] {
            assert_eq!(refused::<Embed>(&body), expected, "{body}");
        }
        for (body, expected) in [
            (json!({ "texts": ["a"] }), invalid("the request has no 'query'")),
            (json!({ "query": "q" }), invalid("the request has no 'texts'")),
            (
                json!({ "query": ["q"], "texts": ["a"] }),
                invalid("query must be a string of whole Unicode characters, got [\"q\"]"),
            ),
            (json!({ "query": "q", "texts": "a" }), invalid("texts must be a list of strings, got \"a\"")),
            (json!({ "query": "q", "texts": ["a", [1]] }), invalid("texts[1] must be a string, got [1]")),
            (
                json!({ "query": "q", "texts": ["a"], "raw_scores": true }),
                absent("raw_scores must be false: scores are as the model's own settings say"),
            ),
        ] {
            assert_eq!(refused::<Rerank>(&body), expected, "{body}");
        }
    }
}
