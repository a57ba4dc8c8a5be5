//! An output beside what it should be: how far its numbers are off, and how many of its labels agree.

use crate::{
    error::shorten,
    model::warmup::floats,
    tensor::{DType, Data, Tensor},
};

/// What floats may differ by where nothing else is said; of those above 1, the share of them. Sums of one row come out
/// in another order with other threads, batches and processors, and differ by some 1e-6 or by the last bit or two of a
/// shorter float; a model that was trained anew differs by more than this.
fn usual_difference(dtype: DType) -> f64 {
    match dtype {
        DType::Fp16 => 0.002,
        DType::Bf16 => 0.02,
        _ => 0.0001,
    }
}

/// How far a float may be from what it should be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance(Option<f64>);

impl Tolerance {
    /// As `golden.max_difference` says, or as usual.
    pub(super) fn new(max_difference: Option<f64>) -> Self {
        Self(max_difference)
    }

    fn around(self, expected: f64, dtype: DType) -> f64 {
        // No tolerance covers infinity, also not a share of it.
        let size = if expected.is_finite() { expected.abs().max(1.0) } else { 1.0 };
        self.0.unwrap_or(usual_difference(dtype) * size)
    }
}

/// What a comparison found.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Comparison {
    /// How many labels there are: the classes of rows of scores, else the elements.
    pub(super) labels: usize,
    pub(super) agreed: usize,
    /// The first label that does not agree, in words.
    pub(super) miss: Option<String>,
    /// Between any two floats; infinite when only one of them is a number, or finite.
    pub(super) max_difference: f64,
    /// The element that is off by most, in words: a float beyond the tolerance, or any other that is not equal.
    pub(super) deviation: Option<String>,
}

/// Compares tensors of the same shape and type. With `scores` each row along the
/// last dimension stands for its largest element.
pub(super) fn compare(got: &Tensor, expected: &Tensor, scores: bool, tolerance: Tolerance) -> Comparison {
    let words = |index| format!("element {index} is {}, expected {}", shown(got, index), shown(expected, index));
    let (Some(numbers), Some(wanted)) = (floats(got), floats(expected)) else {
        let count = crate::tensor::elements(&expected.shape).unwrap_or_default();
        let wrong: Vec<usize> = (0..count).filter(|&index| element(got, index) != element(expected, index)).collect();
        let miss = wrong.first().map(|&index| words(index));
        let agreed = count - wrong.len();
        return Comparison { labels: count, agreed, deviation: miss.clone(), miss, max_difference: 0.0 };
    };
    let differences: Vec<f64> = numbers.iter().zip(&wanted).map(|(&got, &wanted)| difference(got, wanted)).collect();
    let allowed = |index: usize| tolerance.around(wanted[index], expected.dtype);
    let is_beyond = |&index: &usize| differences[index] > allowed(index);
    let worst = (0..wanted.len())
        .filter(is_beyond)
        .reduce(|worst, index| if differences[index] > differences[worst] { index } else { worst });
    let deviation = worst.map(|index| {
        let (apart, allowed) = (differences[index], allowed(index));
        format!("{}: {apart} apart, and golden.max_difference allows {allowed}", words(index))
    });
    let width = if scores { expected.shape.last().copied().unwrap_or(1).max(1) } else { 1 };
    let tops = |row: usize| [&numbers, &wanted].map(|values| top(&values[row * width..][..width]));
    let agrees = |&row: &usize| if scores { tops(row)[0] == tops(row)[1] } else { !is_beyond(&row) };
    let labels = wanted.len() / width;
    let mut wrong = (0..labels).filter(|row| !agrees(row));
    let miss = wrong.next().map(|row| match scores {
        true => {
            let [got, wanted] =
                tops(row).map(|top| top.map_or("no number".to_owned(), |class| format!("class {class}")));
            format!("row {row} is {got}, expected {wanted}")
        }
        false => words(row),
    });
    Comparison {
        labels,
        agreed: labels - usize::from(miss.is_some()) - wrong.count(),
        miss,
        max_difference: differences.iter().copied().fold(0.0, f64::max),
        deviation,
    }
}

/// None between equal infinities, and between what is no number and should be none.
fn difference(got: f64, expected: f64) -> f64 {
    let same = got == expected || (got.is_nan() && expected.is_nan());
    match (got - expected).abs() {
        _ if same => 0.0,
        apart if apart.is_finite() => apart,
        _ => f64::INFINITY,
    }
}

/// The first of the largest elements; `None` when some element is no number.
fn top(row: &[f64]) -> Option<usize> {
    let larger = |best: usize, index: usize| if row[index] > row[best] { index } else { best };
    (!row.iter().any(|value| value.is_nan())).then(|| (0..row.len()).fold(0, larger))
}

fn element(tensor: &Tensor, index: usize) -> &[u8] {
    match &tensor.data {
        Data::Plain(bytes) => {
            let size = tensor.dtype.size().unwrap_or(1);
            &bytes[index * size..][..size]
        }
        Data::Strings(texts) => &texts[index],
    }
}

/// An element in the words of JSON, a long text shortened.
fn shown(tensor: &Tensor, index: usize) -> String {
    let raw = element(tensor, index);
    let mut wide = [0; 8];
    wide[..raw.len().min(8)].copy_from_slice(&raw[..raw.len().min(8)]);
    let unsigned = u64::from_le_bytes(wide);
    // The upper bits of a narrower number are shifted out, and its sign back in.
    let unused = 64 - 8 * raw.len().clamp(1, 8) as u32;
    let signed = (unsigned << unused).cast_signed() >> unused;
    let float =
        || floats(&Tensor { shape: [1].as_slice().into(), data: Data::Plain(raw.to_vec().into()), ..tensor.clone() });
    let float = || float().and_then(|values| values.first().copied()).unwrap_or(f64::NAN);
    match tensor.dtype {
        DType::Bytes => format!("{:?}", shorten(&String::from_utf8_lossy(raw))),
        DType::Bool => (unsigned != 0).to_string(),
        DType::Uint8 | DType::Uint16 | DType::Uint32 | DType::Uint64 => unsigned.to_string(),
        DType::Int8 | DType::Int16 | DType::Int32 | DType::Int64 => signed.to_string(),
        DType::Fp64 => float().to_string(),
        // As short as they are: a float's neighbours are further apart than those of a double.
        DType::Fp32 | DType::Fp16 | DType::Bf16 => (float() as f32).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn floats_of(values: &[f32], shape: &[usize]) -> Tensor {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new("y".into(), DType::Fp32, shape.into(), Data::Plain(data)).unwrap()
    }

    fn compared(got: &[f32], expected: &[f32], tolerance: Option<f64>) -> Comparison {
        let shape = [expected.len()];
        compare(&floats_of(got, &shape), &floats_of(expected, &shape), false, Tolerance::new(tolerance))
    }

    #[test]
    fn floats_are_compared_by_their_difference() {
        let found = compared(&[1.0, 2.0, 3.5], &[1.0, 2.25, 3.0], Some(0.3));
        assert_eq!((found.labels, found.agreed, found.max_difference), (3, 2, 0.5));
        let words = "element 2 is 3.5, expected 3: 0.5 apart, and golden.max_difference allows 0.3";
        assert_eq!(found.deviation.as_deref(), Some(words));
        assert_eq!(compared(&[1.0, 2.0, 3.5], &[1.0, 2.25, 3.0], Some(0.5)).deviation, None);
        assert!(compared(&[1.0], &[1.0], Some(0.0)).deviation.is_none());
    }

    #[test]
    fn the_usual_tolerance_grows_with_what_is_expected() {
        assert_eq!(compared(&[0.50008, 1e6 + 80.0], &[0.5, 1e6], None).deviation, None);
        assert!(compared(&[0.5002], &[0.5], None).deviation.is_some());
        assert!(compared(&[1e6 + 200.0], &[1e6], None).deviation.is_some());
        let half = |bits: u16| {
            let data = Data::Plain(Bytes::copy_from_slice(&bits.to_le_bytes()));
            Tensor::new("y".into(), DType::Fp16, [1].as_slice().into(), data).unwrap()
        };
        let next = |bits: u16| compare(&half(0x3c00 + bits), &half(0x3c00), false, Tolerance::new(None)).deviation;
        assert_eq!(next(2), None, "the last bit or two");
        assert!(next(3).unwrap().starts_with("element 0 is 1.0029297, expected 1: "));
    }

    #[test]
    fn what_is_no_number_equals_only_its_like() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let same = compared(&[nan, inf, -inf], &[nan, inf, -inf], None);
        assert_eq!((same.agreed, same.max_difference, same.deviation), (3, 0.0, None));
        for (got, expected, words) in [
            (nan, 1.0, "element 0 is NaN, expected 1"),
            (1.0, nan, "element 0 is 1, expected NaN"),
            (inf, 1.0, "element 0 is inf, expected 1"),
            (1.0, inf, "element 0 is 1, expected inf"),
            (-inf, inf, "element 0 is -inf, expected inf"),
            (nan, inf, "element 0 is NaN, expected inf"),
        ] {
            for tolerance in [None, Some(1e30)] {
                let found = compared(&[got], &[expected], tolerance);
                assert_eq!((found.agreed, found.max_difference), (0, f64::INFINITY), "{got} {expected}");
                assert!(found.deviation.as_ref().unwrap().starts_with(words), "{found:?}");
            }
        }
    }

    #[test]
    fn rows_of_scores_stand_for_their_largest() {
        let nan = f32::NAN;
        let expected = floats_of(&[0.1, 0.9, 0.5, 0.5, nan, 1.0, 0.2, 0.1], &[4, 2]);
        let got = floats_of(&[0.4, 0.6, 0.5, 0.5, nan, 2.0, nan, 0.1], &[4, 2]);
        let found = compare(&got, &expected, true, Tolerance::new(None));
        assert_eq!((found.labels, found.agreed), (4, 3));
        assert_eq!(found.miss.as_deref(), Some("row 3 is no number, expected class 0"));
        let other =
            compare(&floats_of(&[0.9, 0.1], &[1, 2]), &floats_of(&[0.1, 0.9], &[1, 2]), true, Tolerance::new(None));
        assert_eq!(other.miss.as_deref(), Some("row 0 is class 0, expected class 1"));
    }

    #[test]
    fn all_else_must_be_equal() {
        let plain = |dtype, bytes: &[u8], size| {
            Tensor::new(
                "y".into(),
                dtype,
                [bytes.len() / size].as_slice().into(),
                Data::Plain(Bytes::copy_from_slice(bytes)),
            )
            .unwrap()
        };
        let text = |text: &'static str| {
            Tensor::new("y".into(), DType::Bytes, [1].as_slice().into(), Data::Strings(vec![text.into()])).unwrap()
        };
        for (got, expected, words) in [
            (
                plain(DType::Int16, &[1, 0, 0xfe, 0xff], 2),
                plain(DType::Int16, &[1, 0, 2, 0], 2),
                "element 1 is -2, expected 2",
            ),
            (plain(DType::Uint8, &[254], 1), plain(DType::Uint8, &[2], 1), "element 0 is 254, expected 2"),
            (plain(DType::Bool, &[1], 1), plain(DType::Bool, &[0], 1), "element 0 is true, expected false"),
            (text("a\"b"), text("c"), "element 0 is \"a\\\"b\", expected \"c\""),
        ] {
            let found = compare(&got, &expected, false, Tolerance::new(Some(1e9)));
            assert_eq!((found.deviation.as_deref(), found.miss.as_deref()), (Some(words), Some(words)));
            assert_eq!((found.labels - found.agreed, found.max_difference), (1, 0.0));
            let same = compare(&expected, &expected, false, Tolerance::new(Some(0.0)));
            assert_eq!((same.agreed, same.deviation), (same.labels, None));
        }
    }
}
