//! `Tally`: what a version did and what its answers were, counted as they leave.
//!
//! Everything a judge or an operator wants to know of a version comes from the differences between two looks at it, so
//! that counting needs to know nothing of rollouts.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::{
    backend::Signature,
    metrics::{Buckets, Page, Predictions, SCORE_BUCKETS, VALUE_BUCKETS, Way},
    rollout::judge::Window,
    tensor::Tensor,
};

mod answers;
pub mod compare;
pub mod copies;
mod shown;

use answers::{Counted, Look, Seen};
use shown::Shown;

/// What a version did since it was loaded, by the way in which requests came to it.
pub struct Tally {
    /// The outputs that are looked at: name, place in the signature, and how.
    looks: Vec<(Arc<str>, usize, Look)>,
    /// Made when the first such request comes.
    done: [Mutex<Option<Box<Done>>>; Way::ALL.len()],
    /// What the last scrape said of each output's labels. Locked before what was done is looked at, so that nothing old
    /// is told after what is new.
    shown: Mutex<[Vec<Shown>; Way::ALL.len()]>,
    copies: copies::Copies,
}

/// What came in one way.
#[derive(Clone)]
struct Done {
    /// All but the answers.
    window: Window,
    /// Those that are looked at.
    outputs: Vec<Counted>,
}

impl Tally {
    pub fn new(signature: &Signature) -> Self {
        let outputs = signature.outputs.iter().enumerate();
        let looks = outputs.filter_map(|(place, spec)| Some((spec.name.clone(), place, Look::at(spec)?)));
        Self { looks: looks.collect(), done: Default::default(), shown: Mutex::default(), copies: Default::default() }
    }

    /// Counts a request that was answered with an error.
    pub fn failed(&self, way: Way) {
        self.with(way, |done| {
            done.window.requests += 1;
            done.window.errors += 1;
        });
    }

    /// Counts a request whose client left after a time: it would have taken longer than that.
    pub fn given_up(&self, way: Way, after: Duration) {
        self.with(way, |done| done.window.latency.add(after.as_secs_f64()));
    }

    /// Counts a good answer: all of the version's outputs, in the order of its signature.
    pub fn answered(&self, way: Way, took: Duration, outputs: &[Tensor]) {
        self.with(way, |Done { window, outputs: counted }| {
            window.requests += 1;
            window.latency.add(took.as_secs_f64());
            if counted.is_empty() {
                return;
            }
            window.looked_at += 1;
            let mut odd = false;
            for counted in counted {
                odd |= outputs.get(counted.place).is_some_and(|output| !counted.add(output));
            }
            window.no_numbers += u64::from(odd);
        });
    }

    /// Everything since the version was loaded.
    pub fn window(&self, way: Way) -> Window {
        let Done { mut window, outputs } = self.done(way).unwrap_or_else(|| self.nothing());
        window.answers = outputs.iter().filter_map(Counted::answers).collect();
        window
    }

    /// Shows what the version answered. `labels` are the names of classes, by output.
    pub fn show(&self, model: &str, version: &str, labels: &BTreeMap<Arc<str>, Arc<[Box<str>]>>, page: &mut Page) {
        let mut shown = self.shown.lock();
        for (way, shown) in Way::ALL.into_iter().zip(shown.iter_mut()) {
            let Some(done) = self.done(way) else { continue };
            shown.resize_with(done.outputs.len(), Shown::default);
            for (counted, shown) in done.outputs.iter().zip(shown) {
                let names = labels.get(&counted.output).map_or(&[][..], |names| names);
                show(counted, shown, names, [model, version], way, page);
            }
        }
    }

    /// A copy: requests wait while one looks.
    fn done(&self, way: Way) -> Option<Done> {
        self.done[way as usize].lock().as_deref().cloned()
    }

    fn with(&self, way: Way, work: impl FnOnce(&mut Done)) {
        let mut done = self.done[way as usize].lock();
        work(done.get_or_insert_with(|| Box::new(self.nothing())));
    }

    fn nothing(&self) -> Done {
        let outputs = self.looks.iter().map(|(name, place, look)| Counted::new(name.clone(), *place, *look));
        Done { window: Window::default(), outputs: outputs.collect() }
    }
}

/// Shows what one output answered in one way.
fn show(
    counted: &Counted,
    shown: &mut Shown,
    names: &[Box<str>],
    [model, version]: [&str; 2],
    way: Way,
    page: &mut Page,
) {
    let mut found = Predictions {
        model,
        version,
        way,
        output: &counted.output,
        labels: None,
        scores: None,
        values: None,
        moments: None,
        nonfinite: (!matches!(counted.seen, Seen::Labels(_))).then_some(counted.nonfinite),
    };
    let mut up_to = Vec::new();
    match &counted.seen {
        _ if !counted.says_something() => {}
        Seen::Finite => {}
        Seen::Labels(labels) => found.labels = Some(shown.tell(&labels.counts(), labels.other(), names)),
        Seen::Scores(labels, scores) => {
            found.labels = Some(shown.tell(&labels.counts(), labels.other(), names));
            let mut count = 0;
            up_to.extend(scores.counts.iter().map(|here| {
                count += here;
                count
            }));
            found.scores = Some(Buckets { bounds: &SCORE_BUCKETS, up_to: &up_to, sum: scores.sum, count });
        }
        Seen::Values(values) => {
            up_to.extend(VALUE_BUCKETS.iter().map(|&bound| values.histogram.up_to(bound)));
            let count = values.histogram.total();
            found.values = Some(Buckets { bounds: &VALUE_BUCKETS, up_to: &up_to, sum: values.sum, count });
            found.moments = values.moments.read();
        }
    }
    page.predictions(&found);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::TensorSpec,
        metrics::Metrics,
        rollout::judge::Kind,
        tensor::{DType, Data},
    };

    fn tally(outputs: &[(&str, DType, &[i64])]) -> Tally {
        let spec = |&(name, dtype, shape): &(&str, DType, &[i64])| TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        Tally::new(&Signature { outputs: outputs.iter().map(spec).collect(), ..Signature::default() })
    }

    fn floats(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(name.into(), DType::Fp32, shape.into(), Data::Plain(bytes.into())).unwrap()
    }

    fn labels(window: &Window) -> Vec<(String, u64)> {
        let Kind::Labels { counts, .. } = &window.answers[0].kind else { panic!("values") };
        counts.iter().map(|(label, count)| (label.to_string(), *count)).collect()
    }

    #[test]
    fn the_first_of_the_best_scores_is_the_label_in_rows_of_any_width() {
        for width in [2, 15, 16, 17, 100, 1000] {
            for at in [0, 1, width / 2, width - 2, width - 1] {
                let spec = [("scores", DType::Fp32, &[-1, width as i64][..])];
                let tally = tally(&spec);
                let mut row: Vec<f32> = (0..width).map(|index| (index % 7) as f32 / 10.0).collect();
                row[at] = 0.9;
                row[width - 1] = 0.9;
                tally.answered(Way::Stable, Duration::ZERO, &[floats("scores", &[1, width], &row)]);
                let expected = [(at.to_string(), 1)];
                assert_eq!(labels(&tally.window(Way::Stable)), expected, "{width}");
                let none = vec![f32::NAN; width];
                tally.answered(Way::Stable, Duration::ZERO, &[floats("scores", &[1, width], &none)]);
                row[width / 2] = f32::NAN;
                row[at] = f32::INFINITY;
                tally.answered(Way::Stable, Duration::ZERO, &[floats("scores", &[1, width], &row)]);
                let window = tally.window(Way::Stable);
                assert_eq!((window.looked_at, window.no_numbers), (3, 2), "{width}");
                assert_eq!(labels(&window), [(at.to_string(), 2)], "{width}: infinity is the largest of all");
            }
        }
    }

    #[test]
    fn the_best_score_is_the_label() {
        let tally = tally(&[("scores", DType::Fp32, &[-1, 3])]);
        tally.answered(
            Way::Stable,
            Duration::from_millis(3),
            &[floats("scores", &[2, 3], &[0.1, 0.7, 0.2, 0.9, 0.0, 0.1])],
        );
        tally.answered(Way::Stable, Duration::from_millis(3), &[floats("scores", &[1, 3], &[0.1, f32::NAN, 0.2])]);
        tally.failed(Way::Stable);
        let window = tally.window(Way::Stable);
        assert_eq!((window.requests, window.errors, window.looked_at, window.no_numbers), (3, 1, 2, 1));
        assert_eq!(window.latency.total(), 2);
        assert_eq!(labels(&window), [("0".to_owned(), 1), ("1".to_owned(), 1), ("2".to_owned(), 1)]);
    }

    fn plain(name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Tensor {
        Tensor::new(name.into(), dtype, shape.into(), Data::Plain(bytes.into())).unwrap()
    }

    /// How many of the answers, each to a tally of its own, are no numbers.
    fn odd(dtype: DType, shape: &[i64], answers: &[Tensor]) -> u64 {
        let tally = tally(&[("y", dtype, shape)]);
        answers.iter().for_each(|answer| tally.answered(Way::Stable, Duration::ZERO, std::slice::from_ref(answer)));
        let window = tally.window(Way::Stable);
        assert_eq!(window.looked_at, answers.len() as u64, "{dtype} {shape:?} is not looked at");
        window.no_numbers
    }

    #[test]
    fn floats_of_every_shape_are_numbers_or_not() {
        let shapes: [(&[i64], &[usize]); 7] = [
            (&[], &[]),
            (&[-1], &[3]),
            (&[-1, 3, 2, 2], &[1, 3, 2, 2]),
            (&[-1, 5000], &[2, 5000]),
            (&[-1, -1], &[2, 7]),
            (&[-1, -1], &[2, 5000]),
            (&[-1, -1], &[2, 1]),
        ];
        for (spec, shape) in shapes {
            let count: usize = shape.iter().product();
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![0.5; count];
                let good = floats("y", shape, &values);
                values[count / 2] = value;
                // Of so many elements every third one is looked at, each after three answers.
                let odd = odd(DType::Fp32, spec, &[vec![good; 3], vec![floats("y", shape, &values); 3]].concat());
                let expected = if count > 4096 { 1 } else { 3 };
                assert_eq!(odd, expected, "{value} in {shape:?}");
            }
        }
    }

    #[test]
    fn no_numbers_of_every_width_are_found() {
        let half = |bits: u16| bits.to_le_bytes().to_vec();
        let (f16, bf16) = (half::f16::from_f32, half::bf16::from_f32);
        for (dtype, good, odd_ones) in [
            (
                DType::Fp16,
                [f16(-65504.0).to_bits(), f16(0.0).to_bits(), 0x0001, 0x7bff].map(half),
                [f16(f32::NAN).to_bits(), 0x7c00, 0xfc00, 0x7c01].map(half),
            ),
            (
                DType::Bf16,
                [bf16(-1e38).to_bits(), bf16(0.0).to_bits(), 0x0001, 0x7f7f].map(half),
                [bf16(f32::NAN).to_bits(), 0x7f80, 0xff80, 0x7f81].map(half),
            ),
            (
                DType::Fp64,
                [f64::MAX, f64::MIN, 0.0, f64::MIN_POSITIVE].map(|value| value.to_le_bytes().to_vec()),
                [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -f64::NAN].map(|value| value.to_le_bytes().to_vec()),
            ),
        ] {
            for (element, expected) in good.into_iter().map(|good| (good, 0)).chain(odd_ones.map(|odd| (odd, 1))) {
                let answer = plain("y", dtype, &[1, 1, 1], element.clone());
                assert_eq!(odd(dtype, &[-1, 1, 1], &[answer]), expected, "{element:?} of {dtype}");
            }
        }
    }

    #[test]
    fn rows_behind_the_first_are_looked_through() {
        for (spec, width) in [(&[-1, 3][..], 3), (&[-1, 1], 1), (&[-1, -1], 3)] {
            let mut values = vec![0.5; 100 * width];
            *values.last_mut().unwrap() = f32::NAN;
            assert_eq!(odd(DType::Fp32, spec, &[floats("y", &[100, width], &values)]), 1, "{spec:?}");
        }
        // Every element has its turn, also where the rows are as wide as the stride.
        let mut values = vec![0.5; 3 * 4096];
        values[3 * 1000 + 2] = f32::NAN;
        let answers = vec![floats("y", &[4096, 3, 1], &values); 9];
        assert_eq!(odd(DType::Fp32, &[-1, 3, 1], &answers), 3);
    }

    #[test]
    fn what_is_no_label_is_not_judged_as_one() {
        let tally = tally(&[
            ("image", DType::Fp32, &[-1, 3, 8, 8]),
            ("y", DType::Fp32, &[-1, 1]),
            ("open", DType::Fp32, &[-1, -1]),
            ("tokens", DType::Int64, &[-1, -1]),
        ]);
        assert_eq!(tally.window(Way::Stable).answers.len(), 2, "nothing is known yet of those that are open");
        let answer = |width| {
            let image = floats("image", &[1, 3, 1, 1], &[0.5; 3]);
            [image, floats("y", &[1, 1], &[2.0]), floats("open", &[1, width], &vec![0.5; width])]
        };
        tally.answered(Way::Stable, Duration::ZERO, &answer(5000));
        let window = tally.window(Way::Stable);
        assert_eq!((window.answers.len(), window.looked_at, window.no_numbers), (1, 1, 0));
        let Kind::Values(histogram) = &window.answers[0].kind else { panic!("labels") };
        assert_eq!(histogram.total(), 1);
        let text = shown(&tally);
        assert!(text.contains(r#"nonfinite_total{model="m",version="1",variant="stable",output="open"} 0"#), "{text}");
        assert!(!text.contains(r#"output="open",label="#), "{text}");
        tally.answered(Way::Stable, Duration::ZERO, &answer(4));
        let window = tally.window(Way::Stable);
        assert_eq!(window.answers.iter().map(|answers| &*answers.output).collect::<Vec<_>>(), ["y", "open"]);
    }

    #[test]
    fn without_floats_nothing_is_looked_at_for_numbers() {
        let tally = tally(&[("tokens", DType::Int64, &[-1, -1])]);
        tally.answered(Way::Stable, Duration::ZERO, &[]);
        assert_eq!(tally.window(Way::Stable).looked_at, 0);
    }

    fn integers(name: &str, values: &[i64]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(name.into(), DType::Int64, [values.len()].as_slice().into(), Data::Plain(bytes.into())).unwrap()
    }

    fn shown(tally: &Tally) -> String {
        let mut page = Page::default();
        let names = BTreeMap::from([(Arc::from("label"), Arc::from(["cat", "dog"].map(Box::from)))]);
        tally.show("m", "1", &names, &mut page);
        Metrics::new("", "").render(page)
    }

    #[test]
    fn classes_and_their_scores_are_shown_by_way() {
        let tally = tally(&[("label", DType::Int64, &[-1]), ("scores", DType::Fp32, &[-1, 2])]);
        assert!(!shown(&tally).contains("tidegate_prediction"), "nothing was answered");
        let answer = |scores: &[f32]| [integers("label", &[1, 7]), floats("scores", &[scores.len() / 2, 2], scores)];
        tally.answered(Way::Canary, Duration::ZERO, &answer(&[0.25, 0.75, 0.5, 0.5]));
        tally.answered(Way::Canary, Duration::ZERO, &answer(&[f32::NAN, 1.0, f32::NAN, f32::INFINITY]));
        tally.answered(Way::Stable, Duration::ZERO, &answer(&[f32::NAN, f32::NAN]));
        let text = shown(&tally);
        for line in [
            r#"tidegate_predictions_total{model="m",version="1",variant="canary",output="label",label="dog"} 2"#,
            r#"tidegate_predictions_total{model="m",version="1",variant="canary",output="label",label="7"} 2"#,
            r#"tidegate_predictions_total{model="m",version="1",variant="canary",output="label",label="other"} 0"#,
            r#"tidegate_predictions_total{model="m",version="1",variant="canary",output="scores",label="0"} 1"#,
            r#"tidegate_predictions_total{model="m",version="1",variant="canary",output="scores",label="1"} 3"#,
            r#"tidegate_prediction_score_bucket{model="m",version="1",variant="canary",output="scores",le="0.5"} 1"#,
            r#"tidegate_prediction_score_bucket{model="m",version="1",variant="canary",output="scores",le="1"} 3"#,
            r#"tidegate_prediction_score_sum{model="m",version="1",variant="canary",output="scores"} 2.25"#,
            r#"tidegate_prediction_score_count{model="m",version="1",variant="canary",output="scores"} 3"#,
            r#"tidegate_prediction_nonfinite_total{model="m",version="1",variant="canary",output="scores"} 3"#,
            r#"tidegate_prediction_nonfinite_total{model="m",version="1",variant="stable",output="scores"} 2"#,
            r#"tidegate_predictions_total{model="m",version="1",variant="stable",output="scores",label="other"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains(r#"variant="stable",output="scores",label="0""#), "a row of NaN has no winner");
    }

    #[test]
    fn values_are_shown_with_mean_and_spread() {
        let tally = tally(&[("y", DType::Fp32, &[-1, 1])]);
        tally.answered(Way::Stable, Duration::ZERO, &[floats("y", &[4, 1], &[-1.0, 3.0, f32::NAN, 4.0])]);
        let text = shown(&tally);
        let series = r#"{model="m",version="1",variant="stable",output="y""#;
        for (name, rest, value) in [
            ("value_bucket", r#",le="-1""#, 1.0),
            ("value_bucket", r#",le="0""#, 1.0),
            ("value_bucket", r#",le="4""#, 3.0),
            ("value_bucket", r#",le="+Inf""#, 3.0),
            ("value_sum", "", 6.0),
            ("mean", "", 2.0),
            ("stddev", "", (14.0_f64 / 3.0).sqrt()),
            ("nonfinite_total", "", 1.0),
        ] {
            let start = format!("tidegate_prediction_{name}{series}{rest}}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&start));
            let found: f64 = line.unwrap_or_else(|| panic!("no {start} in\n{text}")).parse().unwrap();
            assert!((found - value).abs() < 1e-9, "{start}{found}");
        }
    }
}
