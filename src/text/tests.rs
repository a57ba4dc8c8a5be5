use std::{fs, time::Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{
    testing::{Echo, FREE, body, encoder, graph, open, pairs, reals, spec, texts, whole},
    *,
};

fn refused(folder: &Path, settings: &Settings, graph: &Signature) -> String {
    Front::read(folder, settings, graph, true).err().unwrap().message
}

/// A copy of a small model whose files a test may change.
fn copied(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(encoder(name).0).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    copy
}

#[test]
fn tokens_are_those_of_transformers() {
    let folders = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/encoders")).unwrap();
    let names = folders.map(|entry| entry.unwrap()).filter(|entry| entry.path().is_dir());
    let mut compared = 0;
    for name in names.map(|entry| entry.file_name().into_string().unwrap()) {
        let (folder, expected) = encoder(&name);
        let is_pair = expected["cases"][0]["pair"].is_array();
        let graph = if is_pair { graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]) } else { body() };
        let front = open(&folder, &Settings::default(), &graph);
        for case in expected["cases"].as_array().unwrap() {
            let text = match case["pair"].as_array() {
                Some(pair) => pairs(&[[pair[0].as_str().unwrap(), pair[1].as_str().unwrap()]]),
                None => texts(&[case["text"].as_str().unwrap()]),
            };
            let rows = front.tokens.rows(&text, Wish::NONE, None).unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
            assert_eq!(rows[0].ids, ids, "{name}: {case}");
            if let Ok(types) = serde_json::from_value::<Vec<u32>>(case["token_type_ids"].clone()) {
                assert_eq!(rows[0].types, types, "{name}: {case}");
            }
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn what_tokens_leave_out_is_put_in() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let ids = Tensor {
        name: IDS.into(),
        ..front.encode(&texts(&["the boat"]), Wish::NONE, &FREE).unwrap().parts[0].inputs[0].clone()
    };
    let complete = front.complete(std::slice::from_ref(&ids));
    assert_eq!(complete.iter().map(|tensor| &*tensor.name).collect::<Vec<_>>(), [IDS, MASK, TYPES]);
    assert!(whole(&complete[1]).iter().all(|mask| *mask == 1) && whole(&complete[2]).iter().all(|kind| *kind == 0));
    assert_eq!(front.complete(&[complete[2].clone(), complete[1].clone(), ids]), complete, "in any order");
    let signature = front.before(Box::new(Echo(body()))).signature().clone();
    let names: Vec<&str> = signature.inputs.iter().map(|spec| &*spec.name).collect();
    assert_eq!(names, [TEXT, IDS, MASK, TYPES]);
    assert_eq!(signature.optional.len(), 4);
    assert_eq!(signature.outputs, [spec("embedding", DType::Fp32, &[-1, 2])]);
}

#[test]
fn texts_that_are_too_long_are_cut_or_refused() {
    let (folder, _) = encoder("bert-mean");
    let long = texts(&[&"the boat waits near the gate ".repeat(20)]);
    let of = |settings: Settings| open(&folder, &settings, &body());
    let length = |front: &Front, truncate| {
        let wish = Wish { truncate, ..Wish::default() };
        front.encode(&long, &wish, &FREE).map(|encoded| encoded.tokens)
    };
    assert_eq!(length(&of(Settings::default()), None).unwrap(), 32, "sentence_bert_config.json says 32");
    let fewer = of(Settings { max_length: Some(9), ..Settings::default() });
    assert_eq!(length(&fewer, None).unwrap(), 9);
    let strict = of(Settings { truncate: Some(false), ..Settings::default() });
    let message = length(&strict, None).unwrap_err().message;
    assert!(
        message.starts_with("input 'text', row 0: it has ") && message.ends_with("and the model takes 32"),
        "{message}"
    );
    assert_eq!(length(&strict, Some(true)).unwrap(), 32, "the request has the last word");
    assert!(length(&fewer, Some(false)).is_err());

    let more = Settings { max_length: Some(65), ..Settings::default() };
    assert_eq!(refused(&folder, &more, &body()), "text.max_length is 65, and the model takes 64 tokens");
    let less = Settings { max_length: Some(2), ..Settings::default() };
    assert!(refused(&folder, &less, &body()).contains("special ones"));
}

#[test]
fn pairs_are_cut_at_the_longer_text() {
    let scores = graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]);
    let front = open(&encoder("bert-reranker").0, &Settings { max_length: Some(16), ..Settings::default() }, &scores);
    let long = "the boat waits near the gate ".repeat(20);
    let [row] = &front.tokens.rows(&pairs(&[["the boat", &long]]), Wish::NONE, None).unwrap()[..] else { panic!() };
    let short = front.tokens.rows(&pairs(&[["the boat", ""]]), Wish::NONE, None).unwrap()[0].ids.len() - 1;
    assert_eq!(row.ids.len(), 16);
    assert_eq!(row.types.iter().filter(|kind| **kind == 0).count(), short, "the query is whole");
}

#[test]
fn bad_texts_are_named() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let of = |tensor: &Tensor| front.encode(tensor, Wish::NONE, &FREE).err().unwrap().message;
    assert_eq!(of(&texts(&[])), "input 'text' holds no text");
    let mut broken = texts(&["a", "b"]);
    broken.data = Data::Strings(vec!["a".into(), Bytes::from_static(b"\xff")]);
    assert!(of(&broken).starts_with("input 'text', row 1: it is no UTF-8: invalid utf-8"));
}

#[test]
fn folders_that_say_what_cannot_be_are_refused() {
    let write = |name: &str, content: &str| {
        let folder = copied("bert-mean");
        fs::create_dir_all(folder.path().join("1_Pooling")).unwrap();
        fs::write(folder.path().join("1_Pooling/config.json"), r#"{"pooling_mode_mean_tokens": true}"#).unwrap();
        fs::write(folder.path().join(name), content).unwrap();
        let message = refused(folder.path(), &Settings::default(), &body());
        assert!(message.contains(name), "{message}");
        message
    };
    assert!(write("config.json", "{").contains("EOF"));
    assert!(write("tokenizer.json", "{}").len() > 20);
    assert!(
        write("modules.json", r#"[{"type": "x.Dense", "path": "2_Dense"}]"#)
            .contains("module 'Dense' is not supported")
    );
    let outside = r#"[{"type": "x.Pooling", "path": "../1_Pooling"}]"#;
    assert!(write("modules.json", outside).contains("leads out of"));
    let max = r#"{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}"#;
    assert!(write("1_Pooling/config.json", max).contains("pooling 'mean with max' is not supported"));
    assert!(write("1_Pooling/config.json", r#"{"pooling_mode": "weightedmean"}"#).contains("'weightedmean'"));

    let folder = copied("bert-mean");
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(refused(folder.path(), &Settings::default(), &body()).contains("has no tokenizer.json"));
    assert!(Front::read(folder.path(), &Settings::default(), &body(), false).unwrap().is_none());

    let (folder, _) = encoder("bert-classification");
    let seven = graph(&[IDS, MASK, TYPES], "logits", &[-1, 7]);
    assert!(refused(&folder, &Settings::default(), &seven).contains("names 3 classes, and the model has 7"));
}

#[test]
fn graphs_that_are_no_encoders_are_left_alone() {
    let (folder, _) = encoder("bert-mean");
    for graph in [
        graph(&["x"], "y", &[-1, 2]),
        graph(&[IDS, "pixels"], "last_hidden_state", &[-1, -1, 2]),
        graph(&[IDS, MASK], "logits", &[-1, -1, 9]),
        graph(&[IDS, MASK], "start_logits", &[-1, -1]),
        Signature { inputs: vec![spec(IDS, DType::Int64, &[1, 128])], ..body() },
    ] {
        assert!(Front::read(&folder, &Settings::default(), &graph, false).unwrap().is_none(), "{graph:?}");
        let message = refused(&folder, &Settings::default(), &graph);
        assert!(message.starts_with("the graph takes no raw text: "), "{message}");
    }
}

#[test]
fn warm_up_gets_rows_that_differ_and_that_the_model_knows() {
    for name in ["bert-mean", "roberta", "xlm-roberta-reranker"] {
        let (folder, expected) = encoder(name);
        let is_reranker = expected["kind"] == "rerank";
        let graph = if is_reranker {
            graph(&[IDS, MASK], "logits", &[-1, 1])
        } else {
            graph(&[IDS, MASK], "last_hidden_state", &[-1, -1, 2])
        };
        let front = open(&folder, &Settings::default(), &graph);
        let sample = front.sample();
        let ids = whole(&sample[0]);
        let length = sample[0].shape[1];
        let mut rows: Vec<&[i64]> = ids.chunks(length).collect();
        rows.dedup();
        assert_eq!(rows.len(), 4);
        let padding = i64::from(front.tokens.padding);
        assert!(ids.iter().all(|id| (0..expected["vocabulary"].as_i64().unwrap()).contains(id) && *id != padding));
    }
}

#[test]
fn what_is_cut_off_of_a_pair_costs_nothing() {
    let scores = graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]);
    let front = open(&encoder("bert-reranker").0, &Settings::default(), &scores);
    let long = "boat ".repeat(20_000);
    let start = Instant::now();
    let tokens = front.encode(&pairs(&[[&long, &long]]), Wish::NONE, &FREE).unwrap().tokens;
    assert_eq!(tokens, 64);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn of_very_long_texts_the_end_that_counts_is_looked_at() {
    let folder = copied("bert-mean");
    fs::remove_file(folder.path().join("modules.json")).unwrap();
    let [head, tail] = ["the boat ", " near the gate"].map(|text| text.to_owned());
    let long = format!("{head}{}{tail}", "a ".repeat(1 << 20));
    let ids = |side: &str| {
        let config = format!(r#"{{"truncation_side": "{side}"}}"#);
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let front = open(folder.path(), &Settings { max_length: Some(8), ..Settings::default() }, &body());
        let of = |text: &str| front.tokens.rows(&texts(&[text]), Wish::NONE, None).unwrap().remove(0).ids;
        (of(&long), of(&head), of(&tail))
    };
    let (cut, head, _) = ids("right");
    assert_eq!(cut[..head.len() - 1], head[..head.len() - 1]);
    let (cut, _, tail) = ids("left");
    assert_eq!(cut[cut.len() - 3..], tail[tail.len() - 3..]);
    let strict = open(folder.path(), &Settings { truncate: Some(false), ..Settings::default() }, &body());
    let message = strict.encode(&texts(&[&long]), Wish::NONE, &FREE).err().unwrap().message;
    assert!(message.contains("bytes, and the model takes"), "{message}");
}

#[test]
fn tokens_that_the_model_does_not_know_are_refused() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let tensor = |name: &str, shape: [usize; 2], values: &[i64]| {
        let data = integers(DType::Int64, values.iter().copied());
        Tensor::new(name.into(), DType::Int64, shape.as_slice().into(), data).unwrap()
    };
    let of = |tensors: &[Tensor]| front.check(tensors, &FREE).map_err(|error| error.message);
    let ids = tensor(IDS, [2, 2], &[0, 5, 179, 7]);
    of(&[ids.clone(), tensor(MASK, [2, 2], &[1, 1, 1, 0])]).unwrap();
    for (tensors, said) in [
        (vec![tensor(IDS, [2, 1], &[5, 180])], "input 'input_ids', row 1: there is no token 180; there are 0 to 179"),
        (vec![tensor(IDS, [1, 2], &[5, -1])], "input 'input_ids', row 0: there is no token -1; there are 0 to 179"),
        (vec![tensor(IDS, [1, 65], &[5; 65])], "input 'input_ids' has rows of 65 tokens, and the model takes 64"),
        (vec![tensor(IDS, [0, 5], &[])], "input 'input_ids' has shape [0, 5], which holds no token"),
        (
            vec![ids.clone(), tensor(MASK, [1, 2], &[1, 1])],
            "input 'attention_mask' must have the shape of 'input_ids', [2, 2], got [1, 2]",
        ),
        (
            vec![ids, tensor(MASK, [2, 2], &[1, 1, 1, 2])],
            "input 'attention_mask', row 1: there is no value 2; there are 0 to 1",
        ),
    ] {
        assert_eq!(of(&tensors).unwrap_err(), said);
    }
}

/// A graph that counts padding, too.
struct Unmasked(Signature);

impl Session for Unmasked {
    fn signature(&self) -> &Signature {
        &self.0
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let [rows, length] = inputs[0].shape[..] else { panic!() };
        let data = Data::Plain(vec![length as f32; rows * 2].into_iter().flat_map(f32::to_le_bytes).collect());
        let shape = [rows, 2].as_slice().into();
        Ok(vec![Tensor { name: "sentence_embedding".into(), dtype: DType::Fp32, shape, data }])
    }
}

#[test]
fn a_graph_that_reads_padding_gets_none() {
    let (folder, _) = encoder("bert-mean");
    let graph = graph(&[IDS, MASK], "sentence_embedding", &[-1, 2]);
    let front = Front::open(&folder, &Settings::default(), &mut Unmasked(graph), true).unwrap().unwrap();
    assert!(!front.pads && front.note().is_some());
    let front = Front::open(&folder, &Settings::default(), &mut Echo(body()), true).unwrap().unwrap();
    assert!(front.pads && front.note().is_none());
}

#[test]
fn graphs_are_tried_with_padding_however_short_texts_are() {
    let (folder, _) = encoder("bert-mean");
    let graph = graph(&[IDS, MASK], "sentence_embedding", &[-1, 2]);
    let short = Settings { max_length: Some(16), ..Settings::default() };
    let front = Front::open(&folder, &short, &mut Unmasked(graph), true).unwrap().unwrap();
    assert!(!front.pads);
}

#[test]
fn tokenizers_that_add_nothing_are_followed() {
    let without = |name: &str| {
        let folder = copied(name);
        let path = folder.path().join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        tokenizer["post_processor"] = Value::Null;
        fs::write(&path, tokenizer.to_string()).unwrap();
        let _ = fs::remove_file(folder.path().join("modules.json"));
        folder
    };
    let folder = without("bert-mean");
    let front = open(folder.path(), &Settings { normalize: Some(false), ..Settings::default() }, &body());
    let given = texts(&["", "the boat"]);
    let encoded = front.encode(&given, Wish::NONE, &FREE).unwrap();
    assert_eq!(encoded.parts[0].inputs[0].shape[..], [1, 1], "one of padding");
    assert_eq!((whole(&encoded.parts[0].inputs[1]), encoded.tokens), (vec![0], 2));
    let answer = front.before(Box::new(Echo(body()))).run(&[given]).unwrap();
    assert_eq!(reals(&answer[0])[..2], [0.0, 0.0], "of no text");

    let folder = without("bert-reranker");
    let scores = graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]);
    let front = open(folder.path(), &Settings::default(), &scores);
    let row = &front.tokens.rows(&pairs(&[["the boat", "gate"]]), Wish::NONE, None).unwrap()[0];
    assert_eq!(row.types, [0, 0, 1], "as transformers has it");
}

#[test]
fn a_query_that_comes_with_each_text_is_read_once() {
    let scores = graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]);
    let front = open(&encoder("bert-reranker").0, &Settings::default(), &scores);
    let given = [["the boat", "waits"], ["the boat", "near"], ["a", "near"], ["the boat", "gate"]];
    let together = front.tokens.rows(&pairs(&given), Wish::NONE, None).unwrap();
    for (pair, row) in given.iter().zip(&together) {
        let alone = &front.tokens.rows(&pairs(&[*pair]), Wish::NONE, None).unwrap()[0];
        assert_eq!((&alone.ids, &alone.types), (&row.ids, &row.types), "{pair:?}");
    }
}

#[test]
fn a_request_may_name_a_prompt() {
    let folder = copied("bert-mean");
    let pooled = |config: &str| {
        fs::create_dir_all(folder.path().join("1_Pooling")).unwrap();
        fs::write(folder.path().join("1_Pooling/config.json"), config).unwrap();
    };
    pooled(r#"{"pooling_mode_mean_tokens": true}"#);
    let named = |prompts: &str| fs::write(folder.path().join("config_sentence_transformers.json"), prompts).unwrap();
    named(r#"{"prompts": {"near": "near the ", "gate": "gate ", "none": ""}, "default_prompt_name": "gate"}"#);
    let front = open(folder.path(), &Settings::default(), &body());
    let plain = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let ids = |front: &Front, text: &str, prompt: Option<&str>| {
        let wish = Wish { prompt: prompt.map(Into::into), ..Wish::default() };
        front.tokens.rows(&texts(&[text]), &wish, None).map(|mut rows| rows.remove(0).ids)
    };
    for (prompt, whole) in
        [(None, "gate boat"), (Some("near"), "near the boat"), (Some("gate"), "gate boat"), (Some("none"), "boat")]
    {
        assert_eq!(ids(&front, "boat", prompt), ids(&plain, whole, None), "{prompt:?}");
    }
    let error = ids(&front, "boat", Some("Near")).unwrap_err();
    let expected = "prompt_name must be one that its files name ('gate', 'near', 'none'), got 'Near'";
    assert_eq!((error.code, &*error.message), (Code::Unimplemented, expected));
    let wish = Wish { prompt: Some("Near".into()), ..Wish::default() };
    assert_eq!(front.check_wish(&wish), Err(error));
    let error = ids(&plain, "boat", Some("near")).unwrap_err();
    assert_eq!(error.message, "prompt_name must be absent, as its files name no prompts, got 'near'");

    named(r#"{"prompts": {"near": "near the ", "none": ""}}"#);
    pooled(r#"{"pooling_mode_mean_tokens": true, "include_prompt": false}"#);
    let front = open(folder.path(), &Settings::default(), &body());
    assert!(ids(&front, "boat", Some("near")).unwrap_err().message.contains("include_prompt"));
    assert_eq!(ids(&front, "boat", Some("none")), ids(&plain, "boat", None));
    assert!(front.is_quick(&texts(&["boat"]), Wish::NONE));
}

#[test]
fn a_request_may_say_which_end_is_cut() {
    let ids = |most: usize, side: Option<Side>| {
        let settings = Settings { max_length: Some(most), ..Settings::default() };
        let wish = Wish { side, ..Wish::default() };
        let front = open(&encoder("bert-mean").0, &settings, &body());
        front.tokens.rows(&texts(&["the boat waits near the gate"]), &wish, None).unwrap().remove(0).ids
    };
    let whole = ids(64, None);
    let (left, right) = (ids(6, Some(Side::Left)), ids(6, Some(Side::Right)));
    assert_eq!((left.len(), right.len()), (6, 6));
    assert_eq!(left[1..], whole[whole.len() - 5..]);
    assert_eq!(right[..5], whole[..5]);
    assert_eq!(ids(6, None), right);
}

/// A reranker whose logits are so large that no score tells them apart.
struct Sure(Signature);

impl Session for Sure {
    fn signature(&self) -> &Signature {
        &self.0
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        assert_eq!(inputs.len(), self.0.inputs.len());
        let length = inputs[0].shape[1];
        let tokens = whole(&inputs[1]).chunks(length).map(|mask| mask.iter().sum::<i64>()).collect::<Vec<_>>();
        let data = Data::Plain(tokens.iter().flat_map(|&tokens| (30.0 + tokens as f32).to_le_bytes()).collect());
        Ok(vec![Tensor { name: "logits".into(), dtype: DType::Fp32, shape: [tokens.len(), 1].as_slice().into(), data }])
    }
}

#[test]
fn logits_come_as_they_are_and_scores_from_0_to_1() {
    for (name, inputs, is_identity) in
        [("bert-reranker", &[IDS, MASK, TYPES][..], true), ("xlm-roberta-reranker", &[IDS, MASK], false)]
    {
        let graph = graph(inputs, "logits", &[-1, 1]);
        let front = open(&encoder(name).0, &Settings::default(), &graph);
        let mut session = front.before(Box::new(Sure(graph)));
        let given = pairs(&[["the boat", "waits"], ["a", "near the gate near the gate"]]);
        let mut of = |scores| {
            let wish = Wish { scores, ..Wish::default() };
            let encoded = front.encode(&given, &wish, &FREE).unwrap();
            let outputs = encoded.parts.iter().map(|part| session.run(&part.inputs).unwrap()).collect();
            let outputs = encoded.assemble(outputs);
            let own = reals(&outputs[0]);
            let wanted = front.scored(outputs, &wish);
            assert_eq!((wanted.len(), &*wanted[0].name, &wanted[0].shape[..]), (1, "rerank_score", &[2][..]));
            (own, reals(&wanted[0]))
        };
        let (own, unasked) = of(None);
        assert_eq!(unasked, own);
        let lengths = [&["the boat", "waits"], &["a", "near the gate near the gate"]]
            .map(|pair| 30.0 + front.tokens.rows(&pairs(&[*pair]), Wish::NONE, None).unwrap()[0].ids.len() as f32);
        assert_eq!(of(Some(Scores::Raw)), (own.clone(), lengths.to_vec()), "{name}");
        assert_eq!(of(Some(Scores::Unit)), (own.clone(), vec![1.0; 2]), "{name}");
        assert_eq!(own, if is_identity { lengths.to_vec() } else { vec![1.0; 2] });
    }
}
