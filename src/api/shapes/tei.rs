//! The requests of text-embeddings-inference: embed, from texts to vectors, and rerank, from pairs to scores.

use std::sync::Arc;

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
    id::shorten,
    tensor::Tensor,
    text::{Scores, Side, Wish},
};

/// Bytes of plain text that are written in the time that it takes to sort and to write a text's rank.
const RANK: usize = 128;

/// A request for vectors.
#[derive(Debug)]
pub struct Embed {
    model: Option<String>,
    inputs: Input,
    truncate: Option<bool>,
    side: Option<Side>,
    /// The name of what is put before each text.
    prompt: Option<Arc<str>>,
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
    side: Option<Side>,
    /// Whether scores are logits; else they are from 0 to 1.
    raw_scores: bool,
    return_text: bool,
    /// How long it takes to write the texts, as bytes of plain text.
    weight: usize,
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
        let side = side(direction)?;
        let prompt = prompt.map(prompt_name).transpose()?;
        let inputs = Input::read("inputs", inputs, limit)?;
        if let (Some(name), Input::Ids { .. }) = (&prompt, &inputs) {
            let got = shorten(name);
            return Err(Error::invalid(format!("prompt_name must be absent, as inputs are token ids, got '{got}'")));
        }
        Ok(Self {
            model: texts::model(model)?,
            truncate: texts::flag("truncate", truncate)?,
            side,
            prompt,
            normalize: texts::flag("normalize", normalize)?.unwrap_or(true),
            dimensions: texts::dimensions(dimensions)?,
            inputs,
        })
    }

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn rows(&self) -> usize {
        self.inputs.rows()
    }

    fn wish(&self) -> Wish {
        let Self { truncate, side, .. } = *self;
        Wish { truncate, side, prompt: self.prompt.clone(), ..Wish::default() }
    }

    fn held(&self) -> usize {
        self.inputs.held()
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
        let return_text = texts::flag("return_text", return_text)?.unwrap_or(false);
        Ok(Self {
            model: texts::model(model)?,
            truncate: texts::flag("truncate", truncate)?,
            side: side(direction)?,
            raw_scores: texts::flag("raw_scores", raw)?.unwrap_or(false),
            return_text,
            // They are escaped again as they came.
            weight: if return_text { texts::weight(list.text().as_bytes()) } else { 0 },
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

    fn wish(&self) -> Wish {
        let Self { truncate, side, .. } = *self;
        let scores = Some(if self.raw_scores { Scores::Raw } else { Scores::Unit });
        Wish { truncate, side, scores, ..Wish::default() }
    }

    fn held(&self) -> usize {
        2 * self.texts.len() * size_of::<Bytes>()
    }

    fn told(&self) -> usize {
        self.weight + RANK * self.texts.len()
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

/// The end that texts lose that are too long.
fn side(value: Option<Json<'_>>) -> Result<Option<Side>, Error> {
    let Some(value) = value else { return Ok(None) };
    let name = value.string().unwrap_or_default();
    let sides = [("left", Side::Left), ("right", Side::Right)];
    let side = sides.into_iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, side)| side);
    let wrong = || Error::invalid(format!("truncation_direction must be 'Left' or 'Right', got {}", value.shown()));
    side.ok_or_else(wrong).map(Some)
}

fn prompt_name(value: Json<'_>) -> Result<Arc<str>, Error> {
    let name = value.string().map(|name| Arc::from(&*name));
    name.ok_or_else(|| Error::invalid(format!("prompt_name must be a string, got {}", value.shown())))
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
        assert_eq!(read::<Embed>(&plain).unwrap().wish().truncate, Some(true));
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
    fn wishes_are_passed_on() {
        let body = json!({ "inputs": "a", "prompt_name": "query", "truncation_direction": "left" });
        let wish = read::<Embed>(&body).unwrap().wish();
        assert_eq!((wish.prompt.as_deref(), wish.side, wish.scores), (Some("query"), Some(Side::Left), None));
        for (raw, expected) in [(json!(null), Scores::Unit), (json!(false), Scores::Unit), (json!(true), Scores::Raw)] {
            let body = json!({ "query": "q", "texts": ["a"], "truncation_direction": "Right", "raw_scores": raw });
            let wish = read::<Rerank>(&body).unwrap().wish();
            assert_eq!((wish.side, wish.scores), (Some(Side::Right), Some(expected)));
        }
    }

    #[test]
    fn what_becomes_long_is_known_beforehand() {
        let ragged = json!({ "inputs": [[1, 2, 3, 4], [1], [1]] });
        assert_eq!(read::<Embed>(&ragged).unwrap().held(), 3 * 4 * 8 * 2);
        assert_eq!(read::<Embed>(&json!({ "inputs": ["abc", "de"] })).unwrap().held(), 2 * size_of::<Bytes>());
        let mut body = json!({ "query": "q", "texts": ["abc", "de"] });
        assert_eq!(read::<Rerank>(&body).unwrap().told(), 2 * RANK);
        body["return_text"] = json!(true);
        assert_eq!(read::<Rerank>(&body).unwrap().told(), 2 * RANK + texts::weight(br#"["abc","de"]"#));
        body["texts"] = json!(["\n\u{1}\"".repeat(100), "de"]);
        let escaped = 300 * 5;
        assert!(read::<Rerank>(&body).unwrap().told() > 2 * RANK + escaped);
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
        for (body, expected) in [
            (json!({}), invalid("the request has no 'inputs'")),
            (json!({ "inputs": "a", "truncate": 1 }), invalid("truncate must be true or false, got 1")),
            (json!({ "inputs": "a", "normalize": "no" }), invalid("normalize must be true or false, got \"no\"")),
            (
                json!({ "inputs": [1, 2], "prompt_name": "query" }),
                invalid("prompt_name must be absent, as inputs are token ids, got 'query'"),
            ),
            (json!({ "inputs": "a", "prompt_name": 7 }), invalid("prompt_name must be a string, got 7")),
            (
                json!({ "inputs": "a", "truncation_direction": "up" }),
                invalid("truncation_direction must be 'Left' or 'Right', got \"up\""),
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
                json!({ "query": "q", "texts": ["a"], "raw_scores": 1 }),
                invalid("raw_scores must be true or false, got 1"),
            ),
        ] {
            assert_eq!(refused::<Rerank>(&body), expected, "{body}");
        }
    }
}
