//! The classification extension: an output as its best classes, each as `value:index` or `value:index:label`.
//!
//! The texts are what a C++ server makes of the values: floats have six digits after the point.

use std::cmp::Ordering;

use bytes::{BufMut, Bytes, BytesMut};
use half::{bf16, f16};

use crate::{
    error::{Code, Error},
    tensor::{DType, Data, Shape, Tensor},
};

/// Memory that the texts of one output may take: they are written on a thread that serves connections, and a number
/// may be a hundred times as long in words as it is in the tensor.
const MAX_BYTES: usize = 4 << 20;

/// What the shortest text takes: an integer of one digit, a colon, and an index of one digit.
const SHORTEST: usize = size_of::<Bytes>() + "0:0".len();

/// Indices that may wait beside the best ones before the lesser half is let go.
const SLACK: usize = 1024;

/// The `count` largest elements of `output`, largest first; of equal ones the first in the row comes first, and what
/// is not a number comes last.
///
/// With `by_row` each row of the first dimension is a matter of its own, and the shape is `[rows, count]`; without,
/// all elements are one row, and the shape is `[count]`. A row has no more classes than elements. `labels` names the
/// classes; one that is empty or missing is left out.
///
/// # Errors
/// `InvalidArgument` for elements that are no numbers, `TooLarge` when the texts take more than [`MAX_BYTES`].
pub fn classify(output: &Tensor, by_row: bool, count: usize, labels: &[Box<str>]) -> Result<Tensor, Error> {
    let by_row = by_row && !output.shape.is_empty();
    let inner = if by_row { &output.shape[1..] } else { &output.shape[..] };
    // Fewer than all elements of a tensor that is in memory, unless it is empty.
    let width = crate::tensor::elements(inner).unwrap_or(usize::MAX);
    let count = count.min(width);
    let Data::Plain(bytes) = &output.data else { return Err(no_numbers(output)) };

    let rows = if by_row { output.rows() } else { 1 };
    if rows.saturating_mul(count).saturating_mul(SHORTEST) > MAX_BYTES {
        return Err(too_large(output));
    }
    let mut texts = Texts { labels, bytes: BytesMut::new(), ends: Vec::new() };
    macro_rules! rows {
        ($type:ty, $order:expr, $number:expr) => {{
            let values: &[[u8; size_of::<$type>()]] = bytes.as_chunks().0;
            // An empty tensor has no row to cut, whatever its width.
            for row in values.chunks(width.max(1)) {
                let value = |index: usize| <$type>::from_le_bytes(row[index]);
                for index in best(row.len(), count, |a, b| $order(value(a), value(b))) {
                    texts.push($number(value(index)), index).ok_or_else(|| too_large(output))?;
                }
            }
        }};
    }
    macro_rules! integers {
        ($type:ty) => {
            rows!($type, |a: $type, b: $type| b.cmp(&a), |value: $type| value.to_string())
        };
    }
    macro_rules! floats {
        ($type:ty) => {
            rows!($type, |a: $type, b: $type| descending(a.into(), b.into()), |value: $type| decimal(value.into()))
        };
    }
    match output.dtype {
        DType::Int8 => integers!(i8),
        DType::Int16 => integers!(i16),
        DType::Int32 => integers!(i32),
        DType::Int64 => integers!(i64),
        DType::Uint8 => integers!(u8),
        DType::Uint16 => integers!(u16),
        DType::Uint32 => integers!(u32),
        DType::Uint64 => integers!(u64),
        DType::Fp16 => floats!(f16),
        DType::Bf16 => floats!(bf16),
        DType::Fp32 => floats!(f32),
        DType::Fp64 => floats!(f64),
        DType::Bool | DType::Bytes => return Err(no_numbers(output)),
    }
    let shape: Shape = by_row.then_some(rows).into_iter().chain([count]).collect();
    Tensor::new(output.name.clone(), DType::Bytes, shape, Data::Strings(texts.cut()))
}

fn no_numbers(output: &Tensor) -> Error {
    Error::invalid(format!(
        "output '{}' is {}, and only numbers can be classified (parameter 'classification')",
        output.name, output.dtype
    ))
}

fn too_large(output: &Tensor) -> Error {
    Error::new(
        Code::TooLarge,
        format!(
            "output '{}': its classes take more than {MAX_BYTES} bytes as texts; ask for fewer (parameter \
             'classification')",
            output.name
        ),
    )
}

/// The indices of the first `count` of `len` elements in `order`; of equal elements the first one wins.
///
/// Takes memory for the best ones only: most callers want five of thousands.
fn best(len: usize, count: usize, order: impl Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let in_order = |&a: &usize, &b: &usize| order(a, b).then(a.cmp(&b));
    let keep_best = |indices: &mut Vec<usize>| {
        if count < indices.len() {
            indices.select_nth_unstable_by(count, in_order);
            indices.truncate(count);
        }
    };
    let mut indices = Vec::new();
    for index in 0..len {
        indices.push(index);
        if indices.len() == count.saturating_add(count.max(SLACK)) {
            keep_best(&mut indices);
        }
    }
    keep_best(&mut indices);
    indices.sort_unstable_by(in_order);
    indices
}

fn descending(a: f64, b: f64) -> Ordering {
    let by_value = b.partial_cmp(&a).unwrap_or(Ordering::Equal);
    a.is_nan().cmp(&b.is_nan()).then(by_value)
}

fn decimal(value: f64) -> String {
    if value.is_nan() { "nan".to_owned() } else { format!("{value:.6}") }
}

/// The texts of all classes, one after another in the same memory.
struct Texts<'a> {
    labels: &'a [Box<str>],
    bytes: BytesMut,
    ends: Vec<usize>,
}

impl Texts<'_> {
    /// `None` when there is no room for the text.
    fn push(&mut self, value: String, index: usize) -> Option<()> {
        let text = match self.labels.get(index).filter(|label| !label.is_empty()) {
            Some(label) => format!("{value}:{index}:{label}"),
            None => format!("{value}:{index}"),
        };
        let taken = self.bytes.len() + text.len() + (self.ends.len() + 1) * size_of::<Bytes>();
        if taken > MAX_BYTES {
            return None;
        }
        self.bytes.put(text.as_bytes());
        self.ends.push(self.bytes.len());
        Some(())
    }

    fn cut(self) -> Vec<Bytes> {
        let whole = self.bytes.freeze();
        let mut start = 0;
        self.ends.into_iter().map(|end| whole.slice(std::mem::replace(&mut start, end)..end)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::time::{ClockId, clock_gettime};

    use super::*;

    fn tensor<const N: usize>(dtype: DType, shape: &[usize], elements: impl IntoIterator<Item = [u8; N]>) -> Tensor {
        let bytes: Vec<u8> = elements.into_iter().flatten().collect();
        Tensor::new("y".into(), dtype, shape.into(), Data::Plain(bytes.into())).unwrap()
    }

    fn fp32(shape: &[usize], values: &[f32]) -> Tensor {
        tensor(DType::Fp32, shape, values.iter().map(|value| value.to_le_bytes()))
    }

    fn texts(tensor: &Tensor) -> Vec<String> {
        let Data::Strings(strings) = &tensor.data else { panic!() };
        strings.iter().map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
    }

    fn labels(names: &[&str]) -> Vec<Box<str>> {
        names.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn rows_are_ranked_each_by_itself() {
        let output = fp32(&[2, 3], &[0.1, 0.9, 0.5, -1.0, -3.5, 1e10]);
        let two = classify(&output, true, 2, &labels(&["cat", "dog"])).unwrap();
        assert_eq!((two.dtype, &two.shape[..], &*two.name), (DType::Bytes, &[2, 2][..], "y"));
        assert_eq!(texts(&two), ["0.900000:1:dog", "0.500000:2", "10000000000.000000:2", "-1.000000:0:cat"]);
        let all = classify(&output, false, 2, &[]).unwrap();
        assert_eq!(&all.shape[..], [2]);
        assert_eq!(texts(&all), ["10000000000.000000:5", "0.900000:1"]);
    }

    #[test]
    fn there_are_no_more_classes_than_elements() {
        let clipped = classify(&fp32(&[1, 2], &[1.0, 2.0]), true, usize::MAX, &[]).unwrap();
        assert_eq!((&clipped.shape[..], texts(&clipped).len()), (&[1, 2][..], 2));
        for (shape, by_row, expected) in [
            (&[0, 3][..], true, &[0, 2][..]),
            (&[2, 0], true, &[2, 0]),
            (&[0], true, &[0, 1]),
            (&[0], false, &[0]),
            (&[4, 0, 7], false, &[0]),
        ] {
            let empty = classify(&fp32(shape, &[]), by_row, 2, &[]).unwrap();
            assert_eq!((&empty.shape[..], texts(&empty).len()), (expected, 0), "{shape:?}");
        }
        let scalar = classify(&fp32(&[], &[2.5]), true, 3, &[]).unwrap();
        assert_eq!((&scalar.shape[..], texts(&scalar)), (&[1][..], vec!["2.500000:0".to_owned()]));
        let column = classify(&fp32(&[2], &[7.0, 8.0]), true, 3, &[]).unwrap();
        assert_eq!((&column.shape[..], texts(&column)), (&[2, 1][..], vec!["7.000000:0".into(), "8.000000:0".into()]));
        let deep = classify(&fp32(&[1, 2, 2], &[1.0, 4.0, 3.0, 2.0]), true, 1, &labels(&["a", "b"])).unwrap();
        assert_eq!((&deep.shape[..], texts(&deep)), (&[1, 1][..], vec!["4.000000:1:b".to_owned()]));
    }

    #[test]
    fn equal_values_keep_their_order_and_what_is_no_number_is_last() {
        let output = fp32(&[7], &[f32::NAN, 0.0, f32::NEG_INFINITY, -0.0, f32::INFINITY, -f32::NAN, 0.0]);
        let ranked = classify(&output, false, 7, &[]).unwrap();
        let expected = ["inf:4", "0.000000:1", "-0.000000:3", "0.000000:6", "-inf:2", "nan:0", "nan:5"];
        assert_eq!(texts(&ranked), expected);
        let first = classify(&output, false, 2, &[]).unwrap();
        assert_eq!(texts(&first), expected[..2]);
    }

    #[test]
    fn every_number_is_written_as_its_type_has_it() {
        let best = |output: Tensor| texts(&classify(&output, false, 1, &labels(&["", "b"])).unwrap()).remove(0);
        assert_eq!(best(tensor(DType::Int8, &[2], [[0x80], [0xff]])), "-1:1:b");
        assert_eq!(best(tensor(DType::Uint8, &[2], [[0x80], [0xff]])), "255:1:b");
        assert_eq!(best(tensor(DType::Int16, &[1], [(-300i16).to_le_bytes()])), "-300:0");
        assert_eq!(best(tensor(DType::Uint16, &[1], [65535u16.to_le_bytes()])), "65535:0");
        assert_eq!(best(tensor(DType::Int32, &[1], [i32::MIN.to_le_bytes()])), "-2147483648:0");
        assert_eq!(best(tensor(DType::Uint32, &[1], [u32::MAX.to_le_bytes()])), "4294967295:0");
        // Neighbours that no float tells apart.
        let large = [i64::MAX - 1, i64::MAX].map(i64::to_le_bytes);
        assert_eq!(best(tensor(DType::Int64, &[2], large)), "9223372036854775807:1:b");
        let large = [u64::MAX - 1, u64::MAX].map(u64::to_le_bytes);
        assert_eq!(best(tensor(DType::Uint64, &[2], large)), "18446744073709551615:1:b");
        assert_eq!(best(tensor(DType::Fp16, &[1], [f16::from_f32(0.1).to_le_bytes()])), "0.099976:0");
        assert_eq!(best(tensor(DType::Bf16, &[1], [bf16::from_f32(0.9).to_le_bytes()])), "0.898438:0");
        assert_eq!(best(fp32(&[1], &[0.9])), "0.900000:0");
        assert_eq!(best(tensor(DType::Fp64, &[1], [(1.0f64 / 3.0).to_le_bytes()])), "0.333333:0");
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let flags = tensor(DType::Bool, &[1], [[1]]);
        let strings = Tensor::new("y".into(), DType::Bytes, [1].as_slice().into(), Data::Strings(vec!["a".into()]));
        for (output, name) in [(flags, "BOOL"), (strings.unwrap(), "BYTES")] {
            let message = classify(&output, true, 1, &[]).unwrap_err().message;
            assert!(message.starts_with(&format!("output 'y' is {name}, and only numbers")), "{message}");
        }
    }

    #[test]
    fn the_texts_of_an_output_are_bounded_and_so_is_the_time_they_take() {
        // This thread's own, whatever else the machine does.
        let time = || std::time::Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
        let begin = time();
        let ask = |output: &Tensor, by_row, count, labels: &[Box<str>]| match classify(output, by_row, count, labels) {
            Ok(ranked) => texts(&ranked).iter().map(|text| text.len() + size_of::<Bytes>()).sum::<usize>(),
            Err(error) => {
                assert_eq!(error.code, Code::TooLarge);
                assert!(error.message.starts_with("output 'y': ") && error.message.contains("fewer"), "{error}");
                0
            }
        };
        // The longest text that a number makes: `-`, 309 digits, `.`, 6 digits, `:`.
        let longest = tensor(DType::Fp64, &[500_000], vec![(-1e308f64).to_le_bytes(); 500_000]);
        let fit = |most: usize| {
            (1..=most).map(|n| 318 + (n - 1).to_string().len() + 32).scan(0, |sum, length| {
                *sum += length;
                Some(*sum)
            })
        };
        let count = fit(500_000).take_while(|&sum| sum <= MAX_BYTES).count();
        assert_eq!(ask(&longest, false, count, &[]), fit(count).last().unwrap());
        for count in [count + 1, 100_000, 500_000, usize::MAX] {
            assert_eq!(ask(&longest, false, count, &[]), 0, "{count}");
        }
        // Many short ones, and one of each of many rows.
        let short = tensor(DType::Uint8, &[MAX_BYTES, 1], vec![[7]; MAX_BYTES]);
        assert_eq!(ask(&short, true, 1, &[]), 0);
        assert!(ask(&short, false, 100_000, &[]) > 100_000 * SHORTEST);
        assert_eq!(ask(&short, false, 120_000, &[]), 0);
        // Labels count, too.
        assert_eq!(ask(&fp32(&[1], &[1.0]), false, 1, &["a".repeat(MAX_BYTES).into()]), 0);
        let took = time() - begin;
        assert!(took < std::time::Duration::from_secs(10), "{took:?}");
    }

    #[test]
    fn the_best_are_found_wherever_they_are() {
        let ascending: Vec<u32> = (0..5000).collect();
        let swinging: Vec<u32> = (0..5000).map(|index: u32| index.wrapping_mul(2_654_435_761)).collect();
        for values in [&ascending, &swinging] {
            let mut all: Vec<usize> = (0..values.len()).collect();
            all.sort_by(|&a, &b| values[b].cmp(&values[a]));
            for count in [1, 2, 1000, SLACK, 2 * SLACK, 4999, 5000] {
                let found = best(values.len(), count, |a, b| values[b].cmp(&values[a]));
                assert_eq!(found, all[..count], "{count}");
            }
        }
    }

    /// Takes the largest that is left, again and again.
    fn naive(row: &[f32], count: usize) -> Vec<String> {
        let mut left: Vec<usize> = (0..row.len()).collect();
        let mut picked = Vec::new();
        while picked.len() < count && !left.is_empty() {
            let mut at = 0;
            for candidate in 1..left.len() {
                let (best, other) = (row[left[at]], row[left[candidate]]);
                if other > best || (best.is_nan() && !other.is_nan()) {
                    at = candidate;
                }
            }
            let index = left.remove(at);
            let value = row[index];
            picked.push(if value.is_nan() { format!("nan:{index}") } else { format!("{value:.6}:{index}") });
        }
        picked
    }

    proptest! {
        #[test]
        fn ranks_as_the_naive_way_does(
            rows in 0usize..4,
            width in 1usize..12,
            count in 1usize..15,
            seed in proptest::collection::vec(
                prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(0.0), Just(-0.0), (-3i8..3).prop_map(f32::from),
                    any::<f32>()],
                48,
            ),
        ) {
            let values = &seed[..rows * width];
            let ranked = classify(&fp32(&[rows, width], values), true, count, &[]).unwrap();
            let expected: Vec<String> = values.chunks(width).flat_map(|row| naive(row, count)).collect();
            prop_assert_eq!(&ranked.shape[..], &[rows, count.min(width)]);
            prop_assert_eq!(texts(&ranked), expected);
        }
    }
}
