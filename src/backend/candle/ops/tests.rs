use candle_core::{DType, Device, Tensor};

use super::{
    super::config::Activation,
    functions::{erf, exp},
    *,
};

const TOLERANCE: f32 = 2e-6;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 3.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(left: &Tensor, right: &Tensor, tolerance: f32) {
    assert_eq!(left.dims(), right.dims());
    for (left, right) in values(left).into_iter().zip(values(right)) {
        assert!((left - right).abs() <= tolerance, "{left} and {right}");
    }
}

#[test]
fn functions_are_close_to_those_of_double_precision() {
    for index in -100_000..=100_000 {
        let x = index as f32 / 1000.0;
        let expected = f64::from(x).exp();
        if x < 88.0 && x > -87.0 {
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "exp {x}");
        }
        let expected = candle_core::cpu::erf::erf_f64(f64::from(x));
        assert!((f64::from(erf(x)) - expected).abs() < 4e-7, "erf {x}");
    }
    assert_eq!((exp(f32::NEG_INFINITY), exp(-88.0), exp(0.0)), (0.0, 0.0, 1.0));
    assert_eq!((exp(89.0), exp(f32::MAX)), (f32::INFINITY, f32::INFINITY));
    assert!(exp(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
}

/// An activation in double precision.
type Exact = (Activation, fn(f64) -> f64);

#[test]
fn activations_of_extreme_numbers_are_those_of_double_precision() {
    use candle_core::cpu::erf::erf_f64;
    let least = f32::from_bits(1);
    let sizes =
        [0.0, least, 1e-40, f32::MIN_POSITIVE, 1e-20, 1e-3, 1.0, 5.6, 5.7, 10.0, 88.0, 89.0, 100.0, 1000.0, 1e4];
    let sizes = sizes.into_iter().chain([1e10, 1e20, 1e30, f32::MAX, f32::INFINITY]);
    let numbers: Vec<f32> = sizes.flat_map(|size| [size, -size]).chain([f32::NAN]).collect();
    let exact: [Exact; 5] = [
        (Activation::Gelu, |x| if x < -100.0 { -0.0 } else { 0.5 * x * (1.0 + erf_f64(x / std::f64::consts::SQRT_2)) }),
        (Activation::GeluTanh, |x| {
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + y.tanh())
        }),
        (Activation::Relu, |x| if x < 0.0 { 0.0 } else { x }),
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Tanh, |x| x.tanh()),
    ];
    for (activation, exact) in exact {
        let x = Tensor::from_slice(&numbers, (1, numbers.len()), &Device::Cpu).unwrap();
        let given = values(&Ops::Passes.activate(x, None, activation).unwrap());
        for (x, given) in numbers.iter().zip(given) {
            let expected = exact(f64::from(*x));
            let what = format!("{activation:?} of {x} is {given}, expected {expected}");
            if expected.is_nan() || expected.is_infinite() {
                assert!(
                    f64::from(given).total_cmp(&expected).is_eq() || (given.is_nan() && expected.is_nan()),
                    "{what}"
                );
            } else {
                let tolerance = 2e-6 * expected.abs() + 2e-6 * f64::from(x.abs().min(6.0)) + f64::from(least);
                assert!((f64::from(given) - expected).abs() <= tolerance, "{what}");
            }
        }
    }
    let far = |x: f32| {
        values(&Ops::Passes.activate(Tensor::full(x, (1, 1), &Device::Cpu).unwrap(), None, Activation::Gelu).unwrap())
            [0]
    };
    for x in [-6.0, -1000.0, -1e4, -1e30, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(far(x).to_bits(), (-0.0f32).to_bits(), "{x}: {}", far(x));
    }
}

#[test]
fn activations_are_those_of_candle() {
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh] {
        let (x, bias) = (random(&[7, 38], 1), random(&[38], 2));
        for bias in [None, Some(&bias)] {
            let activated = |ops: Ops| ops.activate(x.copy().unwrap(), bias, activation).unwrap();
            assert_close(&activated(Ops::Passes), &activated(Ops::Plain), TOLERANCE);
            let gated = |ops: Ops| ops.gate(x.copy().unwrap(), bias, activation).unwrap();
            assert_eq!(gated(Ops::Plain).dims(), [7, 19]);
            assert_close(&gated(Ops::Passes), &gated(Ops::Plain), TOLERANCE * 8.0);
        }
    }
}

#[test]
fn rows_are_normalized_as_candle_does() {
    let (x, bias, residual) = (random(&[5, 37], 1), random(&[37], 2), random(&[5, 37], 3));
    for (bias, residual) in [(None, None), (Some(&bias), None), (None, Some(&residual)), (Some(&bias), Some(&residual))]
    {
        let added = |ops: Ops| ops.add(x.copy().unwrap(), bias, residual).unwrap();
        assert_close(&added(Ops::Passes), &added(Ops::Plain), TOLERANCE);
        for shift in [None, Some(random(&[37], 5))] {
            let norm = Norm { weight: random(&[37], 4), bias: shift, epsilon: 1e-5 };
            let normalized = |ops: Ops| ops.normalize(x.copy().unwrap(), bias, residual, &norm).unwrap();
            assert_close(&normalized(Ops::Passes), &normalized(Ops::Plain), TOLERANCE * 4.0);
        }
    }
    let error = Ops::Passes.add(x, None, Some(&random(&[37, 5], 3))).unwrap_err();
    assert!(error.to_string().contains("another shape"), "{error}");
}

#[test]
fn heads_are_those_of_candle() {
    let dims = Dims { rows: 3, tokens: 5, heads: 2, head_size: 6 };
    let (x, bias) = (random(&[15, 36], 1), random(&[36], 2));
    let rotation = Rotation::new(9, 6, 100.0, &Device::Cpu).unwrap();
    for rotation in [None, Some(&rotation)] {
        let split = |ops: Ops| ops.split(x.clone(), Some(&bias), rotation, dims).unwrap();
        let (ours, theirs) = (split(Ops::Passes), split(Ops::Plain));
        assert_close(&ours.queries, &theirs.queries, TOLERANCE * 2.0);
        assert_close(&ours.keys, &theirs.keys, TOLERANCE * 2.0);
        assert_close(&ours.values, &theirs.values, TOLERANCE);
    }
}

/// What each token takes, score by score.
fn attended(heads: &Heads, present: &[bool], window: Option<usize>, dims: Dims) -> Vec<Vec<f32>> {
    let Dims { rows, tokens, heads: count, head_size } = dims;
    let [queries, keys, all] = [&heads.queries, &heads.keys, &heads.values].map(values);
    let place = |row: usize, head: usize, token: usize| ((row * count + head) * tokens + token) * head_size;
    let mut rows_of_tokens = Vec::new();
    for (row, token) in (0..rows).flat_map(|row| (0..tokens).map(move |token| (row, token))) {
        let mut taken = vec![0.0; count * head_size];
        for head in 0..count {
            let query = &queries[place(row, head, token)..][..head_size];
            let (mut whole, mut sums) = (0.0, vec![0.0; head_size]);
            for seen in (0..tokens).filter(|&seen| present[row * tokens + seen]) {
                if window.is_some_and(|window| seen.abs_diff(token) > window) {
                    continue;
                }
                let start = place(row, head, seen);
                let score: f64 = query.iter().zip(&keys[start..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                whole += score.exp();
                sums.iter_mut().zip(&all[start..]).for_each(|(sum, value)| *sum += score.exp() * f64::from(*value));
            }
            if whole > 0.0 {
                let parts = taken[head * head_size..].iter_mut().zip(sums);
                parts.for_each(|(taken, sum)| *taken = (sum / whole) as f32);
            }
        }
        rows_of_tokens.push(taken);
    }
    rows_of_tokens
}

#[test]
fn attention_is_the_same_in_blocks_of_any_size() {
    // All at once, some heads at a time, some tokens at a time, and each token by itself.
    for (rows, tokens, heads) in [(3, 7, 2), (2, 19, 3), (2, 61, 2), (1, 1001, 1)] {
        let dims = Dims { rows, tokens, heads, head_size: 4 };
        let part = |seed| random(&[rows, heads, tokens, 4], seed);
        let parts = Heads { queries: part(1), keys: part(2), values: part(3) };
        for lengths in [vec![tokens; rows], (0..rows).map(|row| tokens * (rows - 1 - row) / rows).collect()] {
            let present: Vec<bool> = lengths.iter().flat_map(|&length| (0..tokens).map(move |i| i < length)).collect();
            for window in [None, Some(0), Some(1), Some(4), Some(30), Some(5000)] {
                let expected = attended(&parts, &present, window, dims);
                for ops in [Ops::Passes, Ops::Plain] {
                    let what = format!("{ops:?} {dims:?} {lengths:?} {window:?}");
                    let mask = Mask::new(ops, present.clone(), window, dims, &Device::Cpu).unwrap();
                    let given = ops.attend(&parts, &mask, window).unwrap();
                    assert_eq!(given.dims(), [rows * tokens, heads * 4], "{what}");
                    for (place, (given, expected)) in values(&given).chunks(heads * 4).zip(&expected).enumerate() {
                        // Of what nobody looks at, candle makes shares of padding.
                        let counts = ops == Ops::Passes || present[place];
                        let close = given.iter().zip(expected).all(|(given, expected)| (given - expected).abs() < 2e-5);
                        assert!(!counts || close, "{what}: token {place} is {given:?}, expected {expected:?}");
                        assert!(given.iter().all(|value| value.is_finite()), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn blocks_have_no_more_scores_than_they_may() {
    for tokens in [1, 2, 9, 64, 200, 1000, 4096, 100_000] {
        for window in [None, Some(0), Some(3), Some(64), Some(1 << 20)] {
            for most in [1, 50, 1000, 2 << 20] {
                let dims = Dims { rows: 2, tokens, heads: 12, head_size: 64 };
                let (pairs, length) = dims.block(window, most);
                let width = window.map_or(tokens, |window| tokens.min(length + 2 * window));
                assert!(pairs >= 1 && (1..=tokens).contains(&length), "{tokens} {window:?} {most}");
                assert!(pairs * length * width <= most.max(width), "{tokens} {window:?} {most}: {pairs} {length}");
            }
        }
    }
    let dims = Dims { rows: 1, tokens: 4096, heads: 12, head_size: 64 };
    assert_eq!(dims.block(None, 2 << 20), (1, 512));
    // What is far away is not computed.
    assert_eq!(dims.block(Some(64), 2 << 20), (64, 128));
}

#[test]
fn weights_of_halves_are_computed_with_in_32_bits() {
    let x = random(&[5, 37], 1);
    for dtype in [DType::F16, DType::BF16] {
        let half = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
        // Of more than one chunk.
        let weight = half(&[37, 1000], 2);
        assert_close(&product(&x, &weight).unwrap(), &x.matmul(&wide(&weight)).unwrap(), 0.0);
        let (bias, scale) = (half(&[37], 3), half(&[37], 4));
        let norm = |of: &dyn Fn(&Tensor) -> Tensor| {
            let norm = Norm { weight: of(&scale), bias: Some(of(&bias)), epsilon: 1e-5 };
            Ops::Passes.normalize(x.copy().unwrap(), Some(&of(&bias)), Some(&x), &norm).unwrap()
        };
        assert_close(&norm(&|weights| weights.clone()), &norm(&wide), 0.0);
        let (first, second) = (half(&[9, 37], 5), half(&[4, 37], 6));
        let look_up = |first, second| Ops::Passes.embed(&[(first, vec![8, 0, 3]), (second, vec![1, 3, 1])]).unwrap();
        let embedded = look_up(&first, &second);
        assert_eq!(embedded.dtype(), DType::F32);
        assert_close(&embedded, &look_up(&wide(&first), &wide(&second)), 0.0);
    }
}

#[test]
fn work_is_the_same_on_one_thread_and_on_many() {
    let x = random(&[600, 300], 1);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| values(&Ops::Passes.activate(x.copy().unwrap(), None, Activation::Gelu).unwrap()))
    };
    assert_eq!(run(1), run(3));
}
