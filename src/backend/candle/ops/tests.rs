use candle_core::{DType, Device, Tensor};

use super::{
    super::config::Activation,
    attention::FAR,
    functions::{erf, exp},
    stored::FEW_ROWS,
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
    assert!(exp(f32::MAX).is_finite());
}

#[test]
fn activations_are_those_of_candle() {
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh] {
        let (x, bias) = (random(&[7, 38], 1), random(&[38], 2));
        let expected = plain::activate(&x.broadcast_add(&bias).unwrap(), activation).unwrap();
        let copy = || x.copy().unwrap();
        assert_close(&activate(copy(), Some(&bias), activation).unwrap(), &expected, TOLERANCE);
        let half = |start| expected.narrow(1, start, 19).unwrap();
        let plainly = plain::activate(&x, activation).unwrap();
        assert_close(&activate(copy(), None, activation).unwrap(), &plainly, TOLERANCE);
        let gated = gate(copy(), Some(&bias), activation).unwrap();
        let other = x.broadcast_add(&bias).unwrap().narrow(1, 19, 19).unwrap();
        assert_close(&gated, &(half(0) * other).unwrap(), TOLERANCE * 8.0);
    }
}

#[test]
fn rows_are_normalized_as_candle_does() {
    let (x, bias, residual) = (random(&[5, 37], 1), random(&[37], 2), random(&[5, 37], 3));
    for shift in [None, Some(random(&[37], 5))] {
        let norm = Norm { weight: random(&[37], 4), bias: shift, epsilon: 1e-5 };
        let sum = (x.broadcast_add(&bias).unwrap() + &residual).unwrap();
        let ours = normalize(x.copy().unwrap(), Some(&bias), Some(&residual), &norm).unwrap();
        assert_close(&ours, &plain::normalize(&sum, &norm).unwrap(), TOLERANCE * 4.0);
        assert_close(&add(x.copy().unwrap(), Some(&bias), Some(&residual)).unwrap(), &sum, TOLERANCE);
    }
    assert!(add(x, None, Some(&random(&[37, 5], 3))).unwrap_err().to_string().contains("another shape"));
}

#[test]
fn heads_are_split_and_merged() {
    let dims = Dims { rows: 3, tokens: 5, heads: 2, head_size: 6 };
    let (x, bias) = (random(&[15, 36], 1), random(&[36], 2));
    let rotation = Rotation::new(9, 6, 100.0, &Device::Cpu).unwrap();
    for rotation in [None, Some(&rotation)] {
        let ours = split(&x, Some(&bias), rotation, dims).unwrap();
        let theirs = plain::split(&x.broadcast_add(&bias).unwrap(), rotation, dims).unwrap();
        assert_close(&ours.0, &theirs.0, TOLERANCE * 2.0);
        assert_close(&ours.1, &theirs.1, TOLERANCE * 2.0);
        assert_close(&ours.2, &theirs.2, TOLERANCE);
    }
    // Values have neither bias nor rotation here, and are the last third of each row.
    let (_, _, heads) = split(&x, None, None, dims).unwrap();
    assert_close(&merge(&heads, dims).unwrap(), &x.narrow(1, 24, 12).unwrap(), 0.0);
}

#[test]
fn padding_and_what_is_far_away_is_not_seen() {
    let dims = Dims { rows: 3, tokens: 37, heads: 2, head_size: 1 };
    let present: Vec<bool> = (0..3 * 37).map(|index| index % 37 < [37, 20, 0][index / 37]).collect();
    let bias = present.iter().map(|&present| if present { 0.0 } else { FAR }).collect::<Vec<f32>>();
    let bias = Tensor::from_vec(bias, (3, 1, 1, 37), &Device::Cpu).unwrap();
    let scores = random(&[3, 2, 37, 37], 1);
    for window in [None, Some(4), Some(100)] {
        let mask = Mask { present: present.clone(), bias: Some(bias.clone()) };
        let ours = attend(scores.copy().unwrap(), &mask, window, dims, (0, 0)).unwrap();
        let theirs = plain::attend(&scores, &mask, window, dims).unwrap();
        let first = |tensor: &Tensor, tokens| tensor.narrow(0, 0, 2).unwrap().narrow(2, 0, tokens).unwrap();
        // What sees no token at all gets shares of padding from candle, and none here.
        assert_close(&first(&ours, 20), &first(&theirs, 20), TOLERANCE);
        let nothing = values(&ours.narrow(0, 2, 1).unwrap());
        assert!(nothing.iter().all(|&share| share == 0.0));
        assert!(values(&theirs).iter().all(|share| share.is_finite()));
    }
    let none = Mask::new(vec![true; 3 * 37], dims, &Device::Cpu).unwrap();
    let ours = attend(scores.copy().unwrap(), &none, None, dims, (0, 0)).unwrap();
    assert_close(&ours, &plain::attend(&scores, &none, None, dims).unwrap(), TOLERANCE);
}

#[test]
fn weights_of_halves_are_computed_with_in_32_bits() {
    let x = random(&[5, 37], 1);
    let rows = random(&[FEW_ROWS + 1, 37], 7);
    for dtype in [DType::F16, DType::BF16] {
        let half = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
        // Of more than one chunk.
        let weight = half(&[37, 1000], 2);
        assert_close(&product(&rows, &weight).unwrap(), &rows.matmul(&wide(&weight)).unwrap(), 0.0);
        let few = product(&x, &weight).unwrap();
        assert_eq!(few.dtype(), DType::F32);
        assert_close(&few, &x.matmul(&wide(&weight)).unwrap(), 0.1);
        let (bias, scale) = (half(&[37], 3), half(&[37], 4));
        let norm = |of: &dyn Fn(&Tensor) -> Tensor| {
            let norm = Norm { weight: of(&scale), bias: Some(of(&bias)), epsilon: 1e-5 };
            normalize(x.copy().unwrap(), Some(&of(&bias)), Some(&x), &norm).unwrap()
        };
        assert_close(&norm(&|weights| weights.clone()), &norm(&wide), 0.0);
        let (first, second) = (half(&[9, 37], 5), half(&[4, 37], 6));
        let look_up = |first, second| embed(&[(first, vec![8, 0, 3]), (second, vec![1, 3, 1])]).unwrap();
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
        pool.install(|| values(&activate(x.copy().unwrap(), None, Activation::Gelu).unwrap()))
    };
    assert_eq!(run(1), run(3));
}
