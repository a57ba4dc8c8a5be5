//! What is read as texts and as token ids, what models get of it, and what is made of their vectors.

use super::*;

fn input(json: &str) -> Result<Input, String> {
    let document = Document::parse(&Bytes::copy_from_slice(json.as_bytes())).unwrap();
    Input::read("input", document.root(), 1 << 20).map_err(|error| error.message)
}

fn texts_of(words: &[&str]) -> Input {
    Input::Texts(words.iter().map(|word| Bytes::copy_from_slice(word.as_bytes())).collect())
}

fn bytes(ids: &[i64]) -> Bytes {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

fn signature(inputs: &[(&str, DType, &[i64])], output: &str, shape: &[i64]) -> Signature {
    let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let inputs = inputs.iter().map(|&(name, dtype, shape)| spec(name, dtype, shape)).collect();
    Signature { inputs, outputs: vec![spec(output, DType::Fp32, shape)], ..Signature::default() }
}

fn vectors(shape: &[usize], numbers: &[f32]) -> Tensor {
    let data = Data::Plain(numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    Tensor::new("embedding".into(), DType::Fp32, shape.into(), data).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let Data::Plain(bytes) = &tensor.data else { unreachable!() };
    bytes.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number)).collect()
}

#[test]
fn inputs_are_texts_or_ids() {
    assert_eq!(input(r#""a\n""#), Ok(texts_of(&["a\n"])));
    assert_eq!(input(r#"["a", "", "ü"]"#), Ok(texts_of(&["a", "", "ü"])));
    assert_eq!(input("[]"), Ok(texts_of(&[])));
    assert_eq!(input("[1, 2]"), Ok(Input::Ids { ids: bytes(&[1, 2]), lengths: vec![2] }));
    assert_eq!(input("[[1], [2, 3]]"), Ok(Input::Ids { ids: bytes(&[1, 2, 3]), lengths: vec![1, 2] }));
    assert_eq!(input("[[1], [2, 3]]").unwrap().tokens(), 3);
}

#[test]
fn other_inputs_are_refused_by_name() {
    let either = "input must be a string, a list of strings, a list of token ids or a list of such lists, got ";
    for (json, expected) in [
        ("7", format!("{either}7")),
        ("null", format!("{either}null")),
        (r#"{"b64": "AA=="}"#, format!(r#"{either}{{"b64": "AA=="}}"#)),
        ("[null]", format!("{either}[null]")),
        ("[NaN]", format!("{either}[{{\"\":0}}]")),
        (r#"["a", 7]"#, "input[1] must be a string, got 7".to_owned()),
        (r#"["a", {"b64": "/w=="}]"#, r#"input[1] must be a string, got {"b64": "/w=="}"#.to_owned()),
        (r#"["\ud800"]"#, r#"input[0] must be a string of whole Unicode characters, got "\ud800""#.to_owned()),
        ("[1, 1.5]", format!("input: element 1 must be an integer from {} to {}, got 1.5", i64::MIN, i64::MAX)),
        ("[1, -2]", "input: token id 1 must not be negative, got -2".to_owned()),
        ("[[1], [2, 3, -4]]", "input[1]: token id 2 must not be negative, got -4".to_owned()),
        ("[[1], []]", "input[1] has no token ids".to_owned()),
        ("[[1], 2]", "input[1] must be a list of token ids, as the first is, got 2".to_owned()),
        ("[[[1]]]", "input[0] must be a list of token ids, as the first is, got [[1]]".to_owned()),
    ] {
        assert_eq!(input(json), Err(expected), "{json}");
    }
    assert!(input(r#"[["a"]]"#).unwrap_err().starts_with("input[0]: element 0 must be an integer"));
}

#[test]
fn lists_are_padded_and_masked() {
    let both: [(&str, DType, &[i64]); 2] = [(IDS, DType::Int64, &[-1, -1]), (MASK, DType::Int64, &[-1, -1])];
    let masked = signature(&both, "embedding", &[-1, 2]);
    let bare = signature(&both[..1], "embedding", &[-1, 2]);
    let uneven = input("[[5], [6, 7]]").unwrap();
    let tensors = uneven.tensors(&masked, 1 << 20).unwrap();
    assert_eq!(tensors.iter().map(|tensor| &*tensor.name).collect::<Vec<_>>(), [IDS, MASK]);
    assert_eq!(tensors[0].shape[..], [2, 2]);
    assert_eq!(tensors[0].data, Data::Plain(bytes(&[5, 0, 6, 7])));
    assert_eq!(tensors[1].data, Data::Plain(bytes(&[1, 0, 1, 1])));
    assert_eq!(
        uneven.tensors(&bare, 1 << 20).unwrap_err().message,
        "it has no input 'attention_mask', so lists of token ids must be of one length, got 1 and 2"
    );
    let even = input("[[5, 6], [7, 8]]").unwrap();
    let tensors = even.tensors(&bare, 1 << 20).unwrap();
    assert_eq!((tensors.len(), &tensors[0].data), (1, &Data::Plain(bytes(&[5, 6, 7, 8]))));
    let short: [(&str, DType, &[i64]); 1] = [(IDS, DType::Int32, &[-1, -1])];
    let short = signature(&short, "embedding", &[-1, 2]);
    let tensors = even.tensors(&short, 1 << 20).unwrap();
    assert_eq!((tensors[0].dtype, tensors[0].byte_len()), (DType::Int32, 16));
    let message = input("[2147483648]").unwrap().tensors(&short, 1 << 20).unwrap_err().message;
    assert_eq!(message, "token ids must not be greater than 2147483647, got 2147483648");
    // One long list among many short ones must not fill the memory.
    let wide = Input::Ids { ids: Bytes::new(), lengths: vec![1 << 20; 1 << 20] };
    assert_eq!(wide.tensors(&masked, 1 << 20).unwrap_err().code, Code::TooLarge);
}

#[test]
fn signatures_tell_the_kind() {
    let text = (TEXT, DType::Bytes, &[-1][..]);
    let pairs = (TEXT, DType::Bytes, &[-1, 2][..]);
    assert!(Kind::Embedding.has(&signature(&[text], "embedding", &[-1, 4])));
    assert!(!Kind::Rerank.has(&signature(&[text], "embedding", &[-1, 4])));
    assert!(Kind::Rerank.has(&signature(&[pairs], "rerank_score", &[-1])));
    assert!(!Kind::Embedding.has(&signature(&[text], "scores", &[-1, 4])));
    assert!(!Kind::Embedding.has(&signature(&[(IDS, DType::Int64, &[-1, -1])], "embedding", &[-1, 4])));
}

#[test]
fn vectors_are_cut_and_scaled() {
    let long = vectors(&[2, 3], &[3.0, 4.0, 9.0, 0.0, 0.0, 1.0]);
    assert_eq!(floats(&shaped(&long, Some(2), true).unwrap()), [0.6, 0.8, 0.0, 0.0]);
    assert_eq!(shaped(&long, None, false).unwrap(), long);
    assert!(!are_unit(&long));
    let message = shaped(&long, Some(4), true).unwrap_err().message;
    assert_eq!(message, "dimensions must be 3 at most, which its vectors have, got 4");
    let unit = vectors(&[1, 2], &[0.6, 0.800_001]);
    assert!(are_unit(&unit));
    assert_eq!(shaped(&unit, Some(2), true).unwrap(), unit, "what has the length stays as it is");
    let known = signature(&[(TEXT, DType::Bytes, &[-1])], "embedding", &[-1, 3]);
    assert_eq!(check_dimensions(Some(4), &known).unwrap_err().message, message);
    assert_eq!(check_dimensions(Some(3), &known), Ok(()));
}

#[test]
fn small_items_and_escapes_take_longer_than_plain_text() {
    let limit = 10_000;
    let list = |item: &str, bytes: usize| format!("[{}]", vec![item; bytes / (item.len() + 1)].join(","));
    for (json, expected) in [
        (format!("\"{}\"", "a".repeat(9_000)), false),
        (format!("\"{}\"", "a".repeat(11_000)), true),
        (list("\"a\"", 1_000), false),
        (list("\"a\"", 1_200), true),
        (list("7", 500), false),
        (list("7", 700), true),
        (format!("\"{}\"", "\\n".repeat(1_500)), false),
        (format!("\"{}\"", "\\n".repeat(1_700)), true),
    ] {
        assert_eq!(is_longer(json.as_bytes(), limit), expected, "{} bytes: {}…", json.len(), &json[..20]);
    }
    assert!(!is_longer(b",,,,", 4 * 33));
}
