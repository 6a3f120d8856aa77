//! Every block format compared with values from ggml's own Python package (`tests/data/make_quant_goldens.py`).
#![cfg(feature = "driver")]

use kvlane::driver::quant::{TensorType, dequantize};

fn bytes(hex: &serde_json::Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap().as_bytes();
    hex.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

#[test]
fn goldens_to_the_bit() {
    let goldens: serde_json::Value = serde_json::from_str(include_str!("data/quant_goldens.json")).unwrap();
    for ty in TensorType::ALL.into_iter().filter(|&t| t != TensorType::F32) {
        let golden = &goldens[ty.name()];
        let data = bytes(&golden["bytes"]);
        let want: Vec<f32> = bytes(&golden["values"]).as_chunks().0.iter().map(|&b| f32::from_be_bytes(b)).collect();
        let mut got = vec![f32::NAN; want.len()];
        dequantize(ty, &data, &mut got).unwrap();
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert_eq!(g.to_bits(), w.to_bits(), "{} element {i}: {g} for {w}", ty.name());
        }
    }
}

#[test]
fn f32_is_copied() {
    let values = [1.5f32, -0.0, f32::MIN_POSITIVE, f32::INFINITY];
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut got = [0.0; 4];
    dequantize(TensorType::F32, &data, &mut got).unwrap();
    assert_eq!(got.map(f32::to_bits), values.map(f32::to_bits));
}

#[test]
fn lengths_that_are_not_whole_blocks_are_errors() {
    for ty in TensorType::ALL {
        let (elements, size) = (ty.block_elements(), ty.block_bytes());
        let mut out = vec![0.0; 3 * elements];
        for wrong in [0, size, 3 * size - 1, 3 * size + 1, 4 * size] {
            assert!(dequantize(ty, &vec![0; wrong], &mut out).is_err(), "{} {wrong}", ty.name());
        }
        dequantize(ty, &vec![0; 3 * size], &mut out).unwrap();
        if elements > 1 {
            assert!(dequantize(ty, &vec![0; size], &mut out[..elements - 1]).is_err());
        }
        assert_eq!(ty.bytes(usize::MAX - usize::MAX % elements).is_some(), size <= elements);
    }
}

#[test]
fn all_types_are_listed() {
    let readable: Vec<TensorType> = (0..256).filter_map(TensorType::from_ggml).collect();
    assert_eq!(readable.len(), TensorType::ALL.len());
    assert!(readable.iter().all(|ty| TensorType::ALL.contains(ty)));
}
