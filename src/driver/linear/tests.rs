use super::*;
use crate::driver::quant::dequantize;
use crate::{Rayon, Serial};

pub(super) fn quantised() -> impl Iterator<Item = TensorType> {
    TensorType::ALL.into_iter().filter(|ty| ty.block_elements() > 1)
}

fn random(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

/// Blocks of random bits, with scales of ordinary size.
pub(super) fn random_blocks(ty: TensorType, n: usize, seed: u64) -> Vec<u8> {
    let mut next = random(seed);
    let mut data: Vec<u8> = (0..n * ty.block_bytes()).map(|_| next() as u8).collect();
    let halves: &[usize] = match ty {
        TensorType::Q8_0 | TensorType::Q4_0 | TensorType::Q5_0 => &[0],
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
        TensorType::Q2_K => &[80, 82],
        TensorType::Q3_K => &[108],
        TensorType::Q6_K => &[208],
        _ => unreachable!(),
    };
    for block in data.chunks_exact_mut(ty.block_bytes()) {
        for &at in halves {
            let value = f16::from_f32((next() % 1000) as f32 / 20_000.0 - 0.02);
            block[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    data
}

fn rows_of_x(n: usize) -> Vec<f32> {
    let mut next = random(3);
    (0..n).map(|_| (next() % 2000) as f32 / 1000.0 - 1.0).collect()
}

fn apply(w: &Matrix, linear: &Linear<'_>, x: &[f32], m: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * w.rows()];
    w.apply(linear, x, m, &mut y, &mut Rounded::default());
    y
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

/// The definition in f64, and the bound of the rounding for each output.
fn definition(values: &[f32], x: &[f32], k: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut bounds) = (Vec::new(), Vec::new());
    for x in x.chunks_exact(k) {
        for w in values.chunks_exact(k) {
            y.push(x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum());
            let group = |(x, w): (&[f32], &[f32])| {
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                f64::from(largest) / 64516.0 * w.iter().map(|w| f64::from(w.abs())).sum::<f64>()
            };
            bounds.push(x.chunks(GROUP).zip(w.chunks(GROUP)).map(group).sum());
        }
    }
    (y, bounds)
}

#[test]
fn quantised_products_keep_their_bounds() {
    for ty in quantised() {
        let (m, n, k) = (5, 53, 2 * ty.block_elements().max(64));
        let data = random_blocks(ty, n * k / ty.block_elements(), 1);
        let mut values = vec![0.0; n * k];
        dequantize(ty, &data, &mut values).unwrap();
        let w = Matrix::from_bytes(ty, n, k, &data).unwrap();
        let x = rows_of_x(m * k);
        let (want, bounds) = definition(&values, &x, k);
        let linear = Linear::new(Isa::Scalar, &Serial);
        let magnitude = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let exact = apply(&w, &linear.exact(true), &x, m);
        let rounded = apply(&w, &linear, &x, m);
        let mut worst = 0.0f64;
        for (i, (want, bound)) in want.iter().zip(bounds).enumerate() {
            let slack = 1e-6 * f64::from(magnitude) * k as f64;
            assert!((f64::from(exact[i]) - want).abs() < slack, "{} {i}: {} for {want}", ty.name(), exact[i]);
            let error = (f64::from(rounded[i]) - want).abs();
            assert!(error < bound + slack, "{} {i}: {} for {want}, bound {bound}", ty.name(), rounded[i]);
            worst = worst.max(error / bound);
        }
        assert!(worst > 0.01, "{}: the rounding of rows has no effect", ty.name());
    }
}

#[test]
fn quantised_bits_depend_on_nothing_else() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for ty in quantised() {
        let (m, n, k) = (77, 1000, 2 * ty.block_elements().max(128));
        let data = random_blocks(ty, n * k / ty.block_elements(), 2);
        let w = Matrix::from_bytes(ty, n, k, &data).unwrap();
        let x = rows_of_x(m * k);
        for exact in [false, true] {
            let want = bits(&apply(&w, &Linear { unit: Unit::Portable, exact, runner: &Serial }, &x, m));
            for unit in Unit::available() {
                for runner in [&Serial as &dyn Runner, &Rayon::pool(&pool)] {
                    let linear = Linear { unit, exact, runner };
                    let got = bits(&apply(&w, &linear, &x, m));
                    assert!(got == want, "{} on {unit:?}, exact {exact}", ty.name());
                    for few in [1, 6, 13] {
                        let got = bits(&apply(&w, &linear, &x[k..][..few * k], few));
                        assert!(got == want[n..][..few * n], "{} {few} rows on {unit:?}, exact {exact}", ty.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_stack_is_its_matrices() {
    let k = 256;
    let types = [TensorType::Q4_K, TensorType::F16, TensorType::Q5_0, TensorType::F32, TensorType::Q6_K];
    let rows = [40, 7, 33, 20, 1];
    let matrices: Vec<Matrix> = types
        .into_iter()
        .zip(rows)
        .map(|(ty, rows)| {
            let elements: Vec<u8> = match ty {
                TensorType::F32 => rows_of_x(rows * k).iter().flat_map(|x| x.to_le_bytes()).collect(),
                TensorType::F16 => rows_of_x(rows * k).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                _ => random_blocks(ty, rows * k / ty.block_elements(), 5),
            };
            Matrix::from_bytes(ty, rows, k, &elements).unwrap()
        })
        .collect();
    let stack = Matrix::stack(matrices.clone()).unwrap();
    assert_eq!((stack.rows(), stack.cols()), (101, k));
    assert_eq!(stack.memory(), matrices.iter().map(Matrix::memory).sum::<usize>());
    let each: Vec<Vec<f32>> = matrices.iter().flat_map(|m| (0..m.rows()).map(|i| m.row(i))).collect();
    assert!((0..101).all(|i| stack.row(i) == each[i]));
    for m in [1, 3, 20] {
        let x = rows_of_x(m * k);
        let linear = Linear::new(Isa::Amx, &Serial);
        let all = apply(&stack, &linear, &x, m);
        let mut first = 0;
        for w in &matrices {
            let alone = apply(w, &linear, &x, m);
            for row in 0..m {
                let (got, want) = (&all[row * 101 + first..][..w.rows()], &alone[row * w.rows()..][..w.rows()]);
                assert!(got == want, "{m} rows, {w:?}");
            }
            first += w.rows();
        }
    }
    assert!(Matrix::stack(Vec::new()).is_err());
    let narrow = Matrix::from_f32(1, 3, vec![0.0; 3]);
    let message = Matrix::stack(vec![stack, narrow]).unwrap_err().to_string();
    assert!(message.contains("256") && message.contains('3'), "{message}");
}

#[test]
fn what_is_no_number_stays_none() {
    let k = 64;
    let w = Matrix::from_bytes(TensorType::Q4_1, 16, k, &random_blocks(TensorType::Q4_1, 32, 9)).unwrap();
    let linear = Linear::new(Isa::Amx, &Serial);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = rows_of_x(2 * k);
        x[k + 40] = bad;
        let y = apply(&w, &linear, &x, 2);
        assert!(y[..16].iter().all(|y| y.is_finite()) && y[16..].iter().all(|y| !y.is_finite()), "{bad}");
    }
}

#[test]
fn bytes_that_are_no_matrix_are_errors() {
    for (ty, rows, cols, bytes) in [
        (TensorType::Q4_1, 2, 33, 40),
        (TensorType::Q4_1, 2, 32, 41),
        (TensorType::Q4_K, 1, 128, 72),
        (TensorType::F32, usize::MAX, 2, 8),
    ] {
        let message = Matrix::from_bytes(ty, rows, cols, &vec![0; bytes]).unwrap_err().to_string();
        assert!(message.contains(&bytes.to_string()) && message.contains(&cols.to_string()), "{message}");
    }
    let empty = Matrix::from_bytes(TensorType::Q8_0, 0, 32, &[]).unwrap();
    empty.apply(&Linear::new(Isa::Scalar, &Serial), &[0.0; 32], 1, &mut [], &mut Rounded::default());
}

#[test]
fn weights_take_the_memory_of_their_file() {
    for ty in TensorType::ALL {
        let (rows, cols) = (96, 512);
        let data = vec![0; ty.bytes(rows * cols).unwrap()];
        let memory = Matrix::from_bytes(ty, rows, cols, &data).unwrap().memory();
        assert!(memory >= data.len() && 10 * memory <= 13 * data.len(), "{}: {memory} for {}", ty.name(), data.len());
    }
}

fn floats(ty: TensorType, n: usize, k: usize, value: impl Fn(usize) -> f32) -> Matrix {
    let values = (0..n * k).map(value);
    let bytes: Vec<u8> = match ty {
        TensorType::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
        TensorType::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
    };
    Matrix::from_bytes(ty, n, k, &bytes).unwrap()
}

const FLOATS: [TensorType; 3] = [TensorType::F32, TensorType::F16, TensorType::BF16];

#[test]
fn a_row_of_few_is_the_row_alone() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let (n, k) = (777, 190);
    for ty in FLOATS {
        let w = floats(ty, n, k, |i| (i as f32).sin());
        let x: Vec<f32> = (0..floats::FEW_ROWS * k).map(|i| (i as f32).cos()).collect();
        let all = apply(&w, &Linear::new(Isa::Amx, &Rayon::pool(&pool)), &x, floats::FEW_ROWS);
        for (x, want) in x.chunks(k).zip(all.chunks(n)) {
            for runner in [&Serial as &dyn Runner, &Rayon::pool(&pool)] {
                assert!(apply(&w, &Linear::new(Isa::Amx, runner), x, 1) == want, "{}", ty.name());
            }
        }
    }
}

#[test]
fn agrees_with_a_plain_sum() {
    let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for ty in FLOATS {
        for (m, n, k) in [(1, 1, 1), (1, 37, 53), (1, 64, 3), (2, 37, 53), (5, 130, 64), (33, 17, 1), (0, 4, 4)] {
            let w = floats(ty, n, k, value);
            let x: Vec<f32> = (0..m * k).map(|i| value(i + 5)).collect();
            for runner in [&Serial as &dyn Runner, &Rayon::pool(&pool)] {
                let y = apply(&w, &Linear::new(Isa::Amx, runner), &x, m);
                for i in 0..m {
                    for j in 0..n {
                        let w = w.row(j);
                        let row = x[i * k..][..k].iter().zip(&w);
                        let want: f64 = row.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let got = f64::from(y[i * n + j]);
                        assert!((got - want).abs() < 1e-5 * k as f64, "{m}x{n}x{k} at {i},{j}: {got} for {want}");
                    }
                }
            }
        }
    }
}
