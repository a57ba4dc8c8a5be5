use bytes::Bytes;

use super::{
    super::{
        IDS, MASK, Settings, TYPES,
        testing::{Echo, FREE, body, encoder, graph, open, pairs, reals, texts, whole},
    },
    *,
};
use crate::backend::Session;

#[test]
fn many_texts_are_grouped_by_length_and_come_back_in_order() {
    let front = open(&encoder("bert-mean").0, &Settings { normalize: Some(false), ..Settings::default() }, &body());
    let long = "the boat waits near the gate ".repeat(3);
    let given = ["a", &long, "", "the boat", "b", &long];
    let encoded = front.encode(&texts(&given), Wish::NONE, &FREE).unwrap();
    assert!(encoded.parts.len() > 2);
    let alone: usize = given.iter().map(|text| front.encode(&texts(&[text]), Wish::NONE, &FREE).unwrap().tokens).sum();
    assert_eq!(encoded.tokens, alone);
    for part in &encoded.parts {
        let padding = whole(&part.inputs[1]).iter().filter(|mask| **mask == 0).count();
        assert!(padding * SPREAD <= whole(&part.inputs[1]).len(), "at most a twentieth is padding");
        let [rows, longest] = part.inputs[0].shape[..] else { panic!() };
        assert_eq!((part.lengths.longest, part.lengths.tokens), (longest, rows * longest - padding));
    }
    let mut session = front.before(Box::new(Echo(body())));
    let together = session.run(&[texts(&given)]).unwrap();
    assert_eq!(together[0].shape[..], [6, 2]);
    for (row, text) in given.iter().enumerate() {
        let alone = session.run(&[texts(&[text])]).unwrap();
        assert_eq!(together[0].slice(row, 1), alone[0], "{text}");
        let ids = &front.tokens.rows(&texts(&[text]), Wish::NONE, None).unwrap()[0].ids;
        let mean = ids.iter().sum::<u32>() as f32 / ids.len() as f32;
        let found = reals(&alone[0]);
        assert!((found[0] - mean).abs() < 1e-3 && (found[1] + mean).abs() < 1e-3, "{found:?} {mean}");
    }
}

#[test]
fn a_request_of_very_many_tokens_is_cut_into_runs() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let text = "the boat waits near the gate";
    let encoded = front.encode(&texts(&vec![text; 3000]), Wish::NONE, &FREE).unwrap();
    assert!(encoded.parts.len() > 1);
    assert!(encoded.parts.iter().all(|part| part.inputs[0].shape.iter().product::<usize>() <= MOST_TOKENS));
    assert_eq!(encoded.parts.iter().map(|part| part.rows.len()).sum::<usize>(), 3000);
    let few = front.encode(&texts(&[text; 5]), Wish::NONE, &Limits { tokens: 4, ..FREE }).unwrap();
    assert_eq!(few.parts.len(), 5, "a text is never cut for it");
}

#[test]
fn a_graph_without_a_mask_gets_no_padding() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &graph(&[IDS], "last_hidden_state", &[-1, -1, 2]));
    let long = "the boat waits near the gate ".repeat(2);
    let encoded = front.encode(&texts(&[&long, &format!("{long} a")]), Wish::NONE, &FREE).unwrap();
    let tokens: usize = encoded.parts.iter().map(|part| part.inputs[0].shape.iter().product::<usize>()).sum();
    assert_eq!((encoded.parts.len(), tokens), (2, encoded.tokens));
}

#[test]
fn what_there_is_no_room_or_time_for_is_refused() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let many = texts(&["the boat"; 10]);
    let few = Limits { bytes: 100, ..FREE };
    let error = front.encode(&many, Wish::NONE, &few).err().unwrap();
    assert_eq!(error.code, Code::TooLarge);
    assert!(error.message.contains("there is room for 100"), "{}", error.message);
    let late = Limits { deadline: Some(Instant::now()), ..FREE };
    assert_eq!(front.encode(&many, Wish::NONE, &late).err().unwrap().code, Code::DeadlineExceeded);
    let parts = front.encode(&many, Wish::NONE, &Limits { rows: 4, ..FREE }).unwrap().parts;
    assert_eq!(parts.iter().map(|part| part.rows.len()).collect::<Vec<_>>(), [4, 4, 2]);
}

#[test]
fn a_query_is_no_reason_to_read_text_by_text() {
    let scores = graph(&[IDS, MASK, TYPES], "logits", &[-1, 1]);
    let front = open(&encoder("bert-reranker").0, &Settings::default(), &scores);
    let query = "the boat waits near the gate ".repeat(1000);
    let given = pairs(&[[&*query, "a"]; 50]);
    let mut reading = front.reading(given.clone(), Wish::default(), FREE);
    assert!(!reading.read_on().unwrap(), "the query itself is long");
    assert!(reading.read_on().unwrap(), "and read once");
    let whole = front.encode(&given, Wish::NONE, &FREE).unwrap();
    assert_eq!(reading.finish().unwrap().parts[0].inputs, whole.parts[0].inputs);
}

#[test]
fn tokens_of_very_many_rows_are_cut_into_runs() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let data = integers(DType::Int64, (0..1000 * 64).map(|number| number % 170));
    let ids = Tensor::new(IDS.into(), DType::Int64, [1000, 64].as_slice().into(), data).unwrap();
    let complete = front.complete(&[ids]);
    let whole_run = Echo(body()).run(&complete).unwrap();
    let split = front.split(complete, Wish::NONE, &Limits { rows: 100, ..FREE });
    assert_eq!(split.parts.len(), 10);
    let outputs = split.parts.iter().map(|part| Echo(body()).run(&part.inputs).unwrap()).collect();
    assert_eq!(split.assemble(outputs), whole_run);
    assert_eq!(front.split(split.parts[0].inputs.clone(), Wish::NONE, &FREE).parts.len(), 1);
}

/// Tokens and a mask that ends so early in each row.
fn ending(width: usize, ends: &[usize]) -> [Tensor; 2] {
    let of = |name: &str, value: fn(usize, usize, usize) -> i64| {
        let values = ends.iter().enumerate().flat_map(|(row, &end)| (0..width).map(move |at| value(row, at, end)));
        let shape = [ends.len(), width].as_slice().into();
        Tensor::new(name.into(), DType::Int64, shape, integers(DType::Int64, values)).unwrap()
    };
    [of(IDS, |row, at, _| (5 + row * 7 + at) as i64), of(MASK, |_, at, end| i64::from(at < end))]
}

#[test]
fn padding_that_a_client_sent_is_not_run() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let complete = front.complete(&ending(40, &[40, 3, 0, 39, 3, 20]));
    let whole_run = Echo(body()).run(&complete).unwrap();
    let expected = front.head.apply(&whole_run, 6, Some(&complete[1])).unwrap();
    let split = front.split(complete.clone(), Wish::NONE, &FREE);
    let of = |part: &Part| (part.rows.clone(), part.inputs[0].shape[1], part.lengths.tokens);
    let found: Vec<_> = split.parts.iter().map(of).collect();
    assert_eq!(found, [(vec![2], 1, 1), (vec![1, 4], 3, 6), (vec![5], 20, 20), (vec![3, 0], 40, 79)]);
    let mut session = front.before(Box::new(Echo(body())));
    let outputs = split.parts.iter().map(|part| session.run(&part.inputs).unwrap()).collect();
    for (found, expected) in split.assemble(outputs).iter().zip(&expected) {
        assert_eq!(found.shape, expected.shape);
        let close = |(found, expected): (&f32, &f32)| (found - expected).abs() < 1e-3;
        assert!(reals(found).iter().zip(&reals(expected)).all(close), "{found:?} {expected:?}");
    }
    // What reads padding gets what it was sent.
    let raw = Arc::new(Front {
        pads: false,
        ..Front::read(&encoder("bert-mean").0, &Settings::default(), &body(), true).unwrap().unwrap()
    });
    let split = raw.split(complete.clone(), Wish::NONE, &FREE);
    assert_eq!(split.parts.len(), 1);
    assert_eq!(split.parts[0].inputs, complete);
    let split = raw.split(complete, &Wish { padded: true, ..Wish::default() }, &FREE);
    let lengths: Vec<usize> = split.parts.iter().map(|part| part.inputs[0].shape[1]).collect();
    assert_eq!(lengths, [1, 3, 20, 39, 40], "unless somebody else put it there; then nothing is padded");
}

#[test]
fn rows_of_one_part_come_back_in_order() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let complete = front.complete(&ending(40, &[40, 39, 40]));
    let mut session = front.before(Box::new(Echo(body())));
    let whole = session.run(&complete).unwrap();
    let split = front.split(complete, Wish::NONE, &FREE);
    let [part] = &split.parts[..] else { panic!("several parts") };
    assert_eq!(part.rows, [1, 0, 2]);
    let outputs = vec![session.run(&part.inputs).unwrap()];
    assert_eq!(split.assemble(outputs), whole);
}

#[test]
fn requests_of_several_lengths_become_one_batch() {
    let front = open(&encoder("bert-mean").0, &Settings { normalize: Some(false), ..Settings::default() }, &body());
    let session = front.before(Box::new(Echo(body())));
    let parts: Vec<Vec<Tensor>> = [3, 5, 1].map(|length| front.complete(&ending(length, &[length; 2]))).to_vec();
    let together = session.gather(&parts.iter().map(|part| &part[..]).collect::<Vec<_>>());
    assert!(together.iter().all(|input| input.shape[..] == [6, 5]));
    assert_eq!(whole(&together[1])[..10], [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]);
    let padding = i64::from(front.tokens.padding);
    assert_eq!(whole(&together[0])[..5], [5, 6, 7, padding, padding]);
    let mut session = session;
    let all = session.run(&together).unwrap();
    for (index, part) in parts.iter().enumerate() {
        assert_eq!(session.run(part).unwrap()[0], all[0].slice(2 * index, 2));
    }
}

#[test]
fn many_texts_are_read_bit_by_bit() {
    let front = open(&encoder("bert-mean").0, &Settings::default(), &body());
    let long = "the boat waits near the gate ".repeat(100);
    let given = texts(&[&*long; 20]);
    let whole = front.encode(&given, Wish::NONE, &FREE).unwrap();
    let mut reading = front.reading(given.clone(), Wish::default(), FREE);
    let mut times = 1;
    while !reading.read_on().unwrap() {
        times += 1;
    }
    assert!(times > 5, "{times}");
    let read = reading.finish().unwrap();
    assert_eq!(read.tokens, whole.tokens);
    let inputs = |encoded: &Encoded| encoded.parts.iter().map(|part| part.inputs.clone()).collect::<Vec<_>>();
    assert_eq!(inputs(&read), inputs(&whole));
    let mut broken = given.clone();
    let Data::Strings(strings) = &mut broken.data else { panic!() };
    strings[19] = Bytes::from_static(b"\xff");
    let mut reading = front.reading(broken, Wish::default(), FREE);
    let error = loop {
        if let Err(error) = reading.read_on() {
            break error;
        }
    };
    assert!(error.message.starts_with("input 'text', row 19: it is no UTF-8"), "{}", error.message);
    let mut reading = front.reading(given, Wish::default(), Limits { bytes: 1000, ..FREE });
    assert_eq!(reading.read_on().err().unwrap().code, Code::TooLarge, "before all is read");
    let nothing = front.reading(texts(&[]), Wish::default(), FREE).read_on();
    assert_eq!(nothing.err().unwrap().message, "input 'text' holds no text");
}
