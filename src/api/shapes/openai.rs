//! OpenAI's embeddings: texts or token ids in, a list of objects with a vector each out.

use base64::{Engine, engine::general_purpose::STANDARD};

use super::{
    members,
    texts::{self, Asked, Input, Kind},
};
use crate::{
    api::codec::{Document, InferReply, NonFinite, Spelling, put_json, write_nested},
    backend::Signature,
    error::Error,
    tensor::{Data, Tensor},
};

/// A request for embeddings. Whose `user` it is means nothing here.
#[derive(Debug)]
pub struct Embeddings {
    model: Option<String>,
    input: Input,
    dimensions: Option<usize>,
    encoding: Encoding,
}

/// How vectors are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Float,
    /// Of their numbers' bytes, little-endian.
    Base64,
}

impl Asked for Embeddings {
    const KIND: Kind = Kind::Embedding;

    fn read(document: &Document, limit: usize) -> Result<Self, Error> {
        let names = ["model", "input", "encoding_format", "dimensions"];
        let [model, input, encoding, dimensions] = members("the request", document.root(), names)?;
        let model = texts::model(model)?;
        let input = input.ok_or_else(|| Error::invalid("the request has no 'input'"))?;
        let encoding = match encoding {
            None => Encoding::Float,
            Some(name) => match name.string().as_deref() {
                Some("float") => Encoding::Float,
                Some("base64") => Encoding::Base64,
                _ => {
                    let got = name.shown();
                    return Err(Error::invalid(format!("encoding_format must be 'float' or 'base64', got {got}")));
                }
            },
        };
        let dimensions = texts::dimensions(dimensions)?;
        Ok(Self { model, input: Input::read("input", input, limit)?, dimensions, encoding })
    }

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn rows(&self) -> usize {
        self.input.rows()
    }

    fn held(&self) -> usize {
        self.input.held()
    }

    fn tensors(&self, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
        texts::check_dimensions(self.dimensions, signature)?;
        self.input.tensors(signature, limit)
    }

    fn write(&self, reply: &InferReply<'_>, tokens: u64, non_finite: NonFinite) -> Result<Vec<u8>, Error> {
        let (vectors, _) = texts::output(reply, Self::KIND, self.rows())?;
        let vectors = texts::shaped(vectors, self.dimensions, self.dimensions.is_some())?;
        let mut json = br#"{"object":"list","data":["#.to_vec();
        for row in 0..self.rows() {
            if row > 0 {
                json.push(b',');
            }
            json.extend_from_slice(br#"{"object":"embedding","index":"#);
            put_json(&mut json, &row)?;
            json.extend_from_slice(br#","embedding":"#);
            match self.encoding {
                Encoding::Float => write_nested(&vectors, Some(row), Spelling::Plain, non_finite, &mut json)?,
                Encoding::Base64 => {
                    if let Data::Plain(bytes) = vectors.slice(row, 1).data {
                        json.push(b'"');
                        json.extend_from_slice(STANDARD.encode(bytes).as_bytes());
                        json.push(b'"');
                    }
                }
            }
            json.push(b'}');
        }
        json.extend_from_slice(br#"],"model":"#);
        put_json(&mut json, reply.model)?;
        // Not every model counts the tokens that it is given.
        let tokens = if tokens == 0 { self.input.tokens() } else { tokens };
        let usage = serde_json::json!({ "prompt_tokens": tokens, "total_tokens": tokens });
        json.extend_from_slice(br#","usage":"#);
        put_json(&mut json, &usage)?;
        json.push(b'}');
        Ok(json)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;
    use crate::tensor::DType;

    fn read(body: &Value) -> Result<Embeddings, Error> {
        Embeddings::read(&Document::parse(&Bytes::from(body.to_string())).unwrap(), 1 << 20)
    }

    fn written(body: &Value, shape: &[usize], numbers: &[f32], tokens: u64) -> Result<Value, Error> {
        let data = Data::Plain(numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
        let outputs = [Tensor::new("embedding".into(), DType::Fp32, shape.into(), data).unwrap()];
        let reply = InferReply { model: "m", version: "1", id: "", outputs: &outputs };
        let json = read(body).unwrap().write(&reply, tokens, NonFinite::Literal)?;
        Ok(serde_json::from_slice(&json).unwrap())
    }

    #[test]
    fn vectors_come_as_numbers_or_base64() {
        let numbers = [3.0, 4.0, 0.5, -1.0];
        let body = json!({ "model": "m", "input": ["a", "b"], "user": { "passed": "over" } });
        assert_eq!(
            written(&body, &[2, 2], &numbers, 7).unwrap(),
            json!({
                "object": "list",
                "data": [
                    { "object": "embedding", "index": 0, "embedding": [3.0, 4.0] },
                    { "object": "embedding", "index": 1, "embedding": [0.5, -1.0] },
                ],
                "model": "m",
                "usage": { "prompt_tokens": 7, "total_tokens": 7 },
            })
        );
        let body = json!({ "input": "a", "encoding_format": "base64" });
        let coded = STANDARD.encode([1.0_f32, -2.0].map(f32::to_le_bytes).as_flattened());
        assert_eq!(written(&body, &[1, 2], &[1.0, -2.0], 0).unwrap()["data"][0]["embedding"], coded);
        let body = json!({ "input": "a", "dimensions": 2 });
        let short = written(&body, &[1, 3], &[0.0, -5.0, 7.0], 0).unwrap();
        assert_eq!(short["data"][0]["embedding"], json!([0.0, -1.0]));
        let ids = json!({ "input": [[1, 2], [3, 4]] });
        assert_eq!(written(&ids, &[2, 1], &[1.0, 1.0], 0).unwrap()["usage"]["total_tokens"], 4);
    }

    #[test]
    fn what_is_no_answer_is_not_sent() {
        let error = written(&json!({ "input": ["a", "b"] }), &[1, 2], &[1.0, 2.0], 0).unwrap_err();
        assert_eq!(error.message, "output 'embedding' must be FP32 with 2 rows, got FP32 [1, 2]");
    }

    #[test]
    fn refusals_name_the_member() {
        for (body, expected) in [
            (json!([]), "the request must be an object, got []"),
            (json!({}), "the request has no 'input'"),
            (json!({ "input": null }), "the request has no 'input'"),
            (json!({ "input": "a", "model": 7 }), "model must be a string, got 7"),
            (
                json!({ "input": "a", "encoding_format": "hex" }),
                "encoding_format must be 'float' or 'base64', got \"hex\"",
            ),
            (json!({ "input": "a", "dimensions": 0 }), "dimensions must be a whole number, 1 at least, got 0"),
            (json!({ "input": "a", "dimensions": "4" }), "dimensions must be a whole number, 1 at least, got \"4\""),
            (json!({ "input": "a", "dimensions": 1.5 }), "dimensions must be a whole number, 1 at least, got 1.5"),
        ] {
            assert_eq!(read(&body).unwrap_err().message, expected, "{body}");
        }
        assert_eq!(read(&json!({ "input": "a", "model": "" })).unwrap().model(), None);
    }
}
