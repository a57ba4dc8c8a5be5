//! How far two answers to one request are apart, output by output.
//!
//! Every element is looked at, however many there are: it is done when nothing else wants the processor, and of copies
//! that wait for it only so many bytes are kept.

use half::{bf16, f16};

use crate::{
    stats::labels::MAX_CLASSES,
    tensor::{DType, Data, Tensor},
};

/// How an output of a copy differs from the live one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// Whether they say different things: another label in some row, or a number where the other has none. A label is
    /// an element that is text, whole number or truth value, or the index of the largest float in a row of 2 to 4096;
    /// other floats are no labels, however far apart.
    pub label_differs: bool,
    /// Of floats that both have.
    pub numbers: Option<Numbers>,
}

/// How far numbers are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    pub max_abs: f64,
    pub mean_abs: f64,
    /// Of both as vectors; `None` when one of them has no direction, or is too long to square.
    pub cosine: Option<f64>,
}

/// Compares an output of a copy with the live one.
///
/// # Errors
/// A sentence that names the output, when they are of different shapes or of types that have nothing in common.
pub fn compare(live: &Tensor, copy: &Tensor) -> Result<Difference, String> {
    if live.shape != copy.shape {
        return Err(format!(
            "output '{}' has shape {:?}, the live one {:?}",
            live.name,
            &copy.shape[..],
            &live.shape[..]
        ));
    }
    let same = |same: bool| Difference { label_differs: !same, numbers: None };
    match (&live.data, &copy.data) {
        (Data::Strings(live), Data::Strings(copy)) => return Ok(same(live == copy)),
        (Data::Plain(live_bytes), Data::Plain(copy_bytes)) => {
            if let (Some(live_floats), Some(copy_floats)) = (floats(live.dtype), floats(copy.dtype)) {
                let pairs = live_floats.of(live_bytes).zip(copy_floats.of(copy_bytes));
                return Ok(Scan::of(pairs, row(live)).difference());
            }
            if let (Some(live), Some(copy)) = (integers(live.dtype), integers(copy.dtype)) {
                return Ok(same(live.of(live_bytes).eq(copy.of(copy_bytes))));
            }
        }
        _ => {}
    }
    Err(format!("output '{}' is {}, the live one {}", live.name, copy.dtype, live.dtype))
}

/// The number of scores among which the largest one is the label, if it is.
fn row(tensor: &Tensor) -> Option<usize> {
    match tensor.shape[..] {
        [_, width] if (2..=MAX_CLASSES).contains(&width) => Some(width),
        _ => None,
    }
}

/// What was seen of pairs of numbers.
#[derive(Default)]
struct Scan {
    label_differs: bool,
    /// Pairs that have a difference.
    compared: u64,
    max_abs: f64,
    sum_abs: f64,
    product: f64,
    squares: [f64; 2],
}

impl Scan {
    fn of(pairs: impl Iterator<Item = (f64, f64)>, row: Option<usize>) -> Self {
        let mut scan = Self::default();
        let nothing = [(0, f64::NEG_INFINITY); 2];
        let mut best = nothing;
        let width = row.unwrap_or(usize::MAX);
        let mut column = 0;
        for (live, copy) in pairs {
            scan.add(live, copy);
            for (best, value) in best.iter_mut().zip([live, copy]) {
                *best = if value > best.1 { (column, value) } else { *best };
            }
            column += 1;
            if column == width {
                scan.label_differs |= best[0].0 != best[1].0;
                (best, column) = (nothing, 0);
            }
        }
        scan
    }

    fn add(&mut self, live: f64, copy: f64) {
        if !(live.is_finite() && copy.is_finite()) {
            // Both answer nothing, or the same infinity: they agree, and have no difference.
            self.label_differs |= live != copy && !(live.is_nan() && copy.is_nan());
            return;
        }
        let apart = (live - copy).abs();
        self.compared += 1;
        self.max_abs = self.max_abs.max(apart);
        self.sum_abs += apart;
        self.product += live * copy;
        self.squares[0] += live * live;
        self.squares[1] += copy * copy;
    }

    fn difference(self) -> Difference {
        let Self { label_differs, compared, max_abs, sum_abs, product, squares } = self;
        let lengths = squares[0].sqrt() * squares[1].sqrt();
        let cosine = if max_abs == 0.0 { 1.0 } else { product / lengths };
        let measurable = cosine.is_finite() && lengths.is_finite();
        let numbers = (compared > 0).then(|| Numbers {
            // Of the largest doubles only.
            max_abs: max_abs.min(f64::MAX),
            mean_abs: (sum_abs / compared as f64).min(f64::MAX),
            cosine: measurable.then_some(cosine.clamp(-1.0, 1.0)),
        });
        Difference { label_differs, numbers }
    }
}

/// Reads elements of so many bytes each.
struct Elements<T> {
    size: usize,
    read: fn(&[u8]) -> T,
}

impl<T> Elements<T> {
    fn of<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = T> + use<'a, T> {
        bytes.chunks_exact(self.size).map(self.read)
    }
}

/// The bytes of one element; never of another length than those that are read.
fn bytes_of<const SIZE: usize>(bytes: &[u8]) -> [u8; SIZE] {
    bytes.try_into().unwrap_or([0; SIZE])
}

fn floats(dtype: DType) -> Option<Elements<f64>> {
    let read: fn(&[u8]) -> f64 = match dtype {
        DType::Fp64 => |bytes| f64::from_le_bytes(bytes_of(bytes)),
        DType::Fp32 => |bytes| f32::from_le_bytes(bytes_of(bytes)).into(),
        DType::Fp16 => |bytes| f16::from_le_bytes(bytes_of(bytes)).into(),
        DType::Bf16 => |bytes| bf16::from_le_bytes(bytes_of(bytes)).into(),
        _ => return None,
    };
    Some(Elements { size: dtype.size()?, read })
}

fn integers(dtype: DType) -> Option<Elements<i128>> {
    let read: fn(&[u8]) -> i128 = match dtype {
        DType::Bool | DType::Uint8 => |bytes| u8::from_le_bytes(bytes_of(bytes)).into(),
        DType::Uint16 => |bytes| u16::from_le_bytes(bytes_of(bytes)).into(),
        DType::Uint32 => |bytes| u32::from_le_bytes(bytes_of(bytes)).into(),
        DType::Uint64 => |bytes| u64::from_le_bytes(bytes_of(bytes)).into(),
        DType::Int8 => |bytes| i8::from_le_bytes(bytes_of(bytes)).into(),
        DType::Int16 => |bytes| i16::from_le_bytes(bytes_of(bytes)).into(),
        DType::Int32 => |bytes| i32::from_le_bytes(bytes_of(bytes)).into(),
        DType::Int64 => |bytes| i64::from_le_bytes(bytes_of(bytes)).into(),
        _ => return None,
    };
    Some(Elements { size: dtype.size()?, read })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;

    fn tensor(dtype: DType, shape: &[usize], bytes: impl IntoIterator<Item = u8>) -> Tensor {
        Tensor::new("y".into(), dtype, shape.into(), Data::Plain(bytes.into_iter().collect())).unwrap()
    }

    fn floats(shape: &[usize], values: &[f32]) -> Tensor {
        tensor(DType::Fp32, shape, values.iter().flat_map(|value| value.to_le_bytes()))
    }

    fn texts(texts: &[&'static str]) -> Tensor {
        let data = Data::Strings(texts.iter().map(|text| text.as_bytes().into()).collect());
        Tensor::new("y".into(), DType::Bytes, [texts.len()].as_slice().into(), data).unwrap()
    }

    fn vectors(live: &[f32], copy: &[f32]) -> Difference {
        compare(&floats(&[live.len()], live), &floats(&[copy.len()], copy)).unwrap()
    }

    #[test]
    fn numbers_are_measured() {
        let found = vectors(&[1.0, 2.0, 2.0], &[1.0, 2.5, 1.0]);
        let Numbers { max_abs, mean_abs, cosine } = found.numbers.unwrap();
        assert_eq!((max_abs, mean_abs), (1.0, 0.5));
        let by_hand = (1.0 + 5.0 + 2.0) / (3.0 * (1.0f64 + 6.25 + 1.0).sqrt());
        assert!((cosine.unwrap() - by_hand).abs() < 1e-12);
        assert!(!found.label_differs, "values are no labels");
        let opposite = vectors(&[3.0, -4.0], &[-3.0, 4.0]).numbers.unwrap();
        assert_eq!(opposite.cosine, Some(-1.0));
    }

    #[test]
    fn the_same_is_the_same_also_without_a_direction() {
        let same = Numbers { max_abs: 0.0, mean_abs: 0.0, cosine: Some(1.0) };
        for values in [&[0.0, 0.0][..], &[3.0, -1.0]] {
            assert_eq!(vectors(values, values), Difference { label_differs: false, numbers: Some(same) });
        }
        assert_eq!(vectors(&[], &[]), Difference::default());
        assert_eq!(vectors(&[0.0], &[2.0]).numbers.unwrap().cosine, None);
        let wide = |values: [f64; 2]| tensor(DType::Fp64, &[2], values.into_iter().flat_map(f64::to_le_bytes));
        let far = compare(&wide([1e308, 1e308]), &wide([-1e308, -1e308])).unwrap().numbers.unwrap();
        assert_eq!(far, Numbers { max_abs: f64::MAX, mean_abs: f64::MAX, cosine: None });
        let long = compare(&wide([1e160, 0.0]), &wide([1e140, 1e140])).unwrap().numbers.unwrap();
        assert_eq!(long.cosine, None, "the one can be squared, and the other not");
    }

    #[test]
    fn labels_are_the_largest_of_each_row() {
        let rows = |values: &[f32]| floats(&[2, 3], values);
        let live = rows(&[0.1, 0.8, 0.1, 0.5, 0.3, 0.2]);
        let differs = |copy: &[f32]| compare(&live, &rows(copy)).unwrap().label_differs;
        assert!(!differs(&[0.2, 0.5, 0.3, 0.4, 0.3, 0.3]));
        assert!(differs(&[0.8, 0.1, 0.1, 0.5, 0.3, 0.2]), "in the first row");
        assert!(differs(&[0.1, 0.8, 0.1, 0.2, 0.3, 0.5]), "in the last row");
        let flat = |values: &[f32]| floats(&[1, 2, 3], values);
        let found = compare(&flat(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), &flat(&[0.0, 0.0, 1.0, 0.0, 0.0, 0.0])).unwrap();
        assert!(!found.label_differs, "only rows of scores have labels");
        let wide = |best: usize| floats(&[1, 5000], &std::array::from_fn::<f32, 5000, _>(|i| f32::from(i == best)));
        assert!(!compare(&wide(1), &wide(2)).unwrap().label_differs);
    }

    #[test]
    fn no_numbers_agree_with_no_numbers_only() {
        for (live, copy, differs) in [
            ([NAN, 1.0], [NAN, 1.0], false),
            ([NAN, 1.0], [0.0, 1.0], true),
            ([0.0, 1.0], [NAN, 1.0], true),
            ([f32::INFINITY, 1.0], [f32::INFINITY, 1.0], false),
            ([f32::INFINITY, 1.0], [f32::NEG_INFINITY, 1.0], true),
            ([f32::INFINITY, 1.0], [NAN, 1.0], true),
        ] {
            let found = vectors(&live, &copy);
            assert_eq!(found.label_differs, differs, "{live:?} and {copy:?}");
            let rest = Numbers { max_abs: 0.0, mean_abs: 0.0, cosine: Some(1.0) };
            assert_eq!(found.numbers, Some(rest), "what both have is measured");
        }
        assert_eq!(vectors(&[NAN], &[NAN]), Difference::default());
    }

    #[test]
    fn texts_and_whole_numbers_are_labels() {
        let differs = |live: &Tensor, copy: &Tensor| {
            let found = compare(live, copy).unwrap();
            assert_eq!(found.numbers, None);
            found.label_differs
        };
        assert!(!differs(&texts(&["a", "b"]), &texts(&["a", "b"])));
        assert!(differs(&texts(&["a", "b"]), &texts(&["a", "c"])));
        let long = |value: i64| tensor(DType::Int64, &[1], value.to_le_bytes());
        let short = |value: i32| tensor(DType::Int32, &[1], value.to_le_bytes());
        assert!(differs(&long(1), &long(2)));
        assert!(!differs(&long(-7), &short(-7)), "whatever their width");
        assert!(differs(&long(1 << 32), &short(0)));
        let unsigned = tensor(DType::Uint64, &[1], u64::MAX.to_le_bytes());
        assert!(differs(&unsigned, &long(-1)));
    }

    #[test]
    fn floats_of_every_width_are_compared() {
        let tensors = [
            floats(&[1], &[1.5]),
            tensor(DType::Fp64, &[1], 1.5f64.to_le_bytes()),
            tensor(DType::Fp16, &[1], f16::from_f32(1.5).to_le_bytes()),
            tensor(DType::Bf16, &[1], bf16::from_f32(1.5).to_le_bytes()),
        ];
        for live in &tensors {
            for copy in &tensors {
                let numbers = compare(live, copy).unwrap().numbers.unwrap();
                assert_eq!(numbers.max_abs, 0.0, "{} and {}", live.dtype, copy.dtype);
            }
        }
    }

    #[test]
    fn what_cannot_be_compared_is_named() {
        let sentence = |live: &Tensor, copy: &Tensor| compare(live, copy).unwrap_err();
        let two = floats(&[2], &[0.0; 2]);
        assert_eq!(sentence(&two, &floats(&[1, 2], &[0.0; 2])), "output 'y' has shape [1, 2], the live one [2]");
        assert_eq!(sentence(&two, &texts(&["0", "0"])), "output 'y' is BYTES, the live one FP32");
        let integer = tensor(DType::Uint8, &[2], [0, 0]);
        assert_eq!(sentence(&integer, &two), "output 'y' is FP32, the live one UINT8");
    }
}
