use kvlane::*;
use std::time::Instant;
fn huge(bytes: usize) -> *mut u8 {
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), bytes + (2 << 20), 3, 0x22, -1, 0) as usize;
        let a = (p + (2 << 20) - 1) & !((2 << 20) - 1);
        libc::madvise(a as *mut _, bytes, 14);
        a as *mut u8
    }
}
struct T {
    p: *mut u8,
    f: CacheFormat,
    shape: [usize; 4],
    strides: [i64; 4],
    s: Vec<f32>,
    ss: [i64; 4],
}
impl T {
    fn new(f: CacheFormat, shape: [usize; 4], bhsd: bool) -> T {
        let n: usize = shape.iter().product();
        let [_, s, h, d] = shape;
        let p = huge(n * f.unit_bytes() + 4096);
        let mut st = 1u64;
        for i in 0..n {
            st = st.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let x = (st >> 40) as f32 / (1 << 23) as f32 - 1.0;
            unsafe {
                match f {
                    CacheFormat::F32 => *(p as *mut f32).add(i) = x,
                    CacheFormat::F16 => *(p as *mut half::f16).add(i) = half::f16::from_f32(x),
                    CacheFormat::Bf16 => *(p as *mut half::bf16).add(i) = half::bf16::from_f32(x),
                    CacheFormat::Int8 => *(p as *mut i8).add(i) = (x * 127.0) as i8,
                    CacheFormat::Fp8E4m3 | CacheFormat::Fp8E5m2 => *p.add(i) = (st >> 33) as u8 & 0xbf,
                    _ => unreachable!(),
                }
            }
        }
        let strides =
            if bhsd { [(n) as i64, d as i64, (s * d) as i64, 1] } else { [n as i64, (h * d) as i64, d as i64, 1] };
        let ss = if bhsd { [(s * h) as i64, 1, s as i64, 1] } else { [(s * h) as i64, h as i64, 1, 1] };
        T { p, f, shape, strides, s: vec![1.0 / 127.0; s * h], ss }
    }
    fn view(&self) -> CacheView<'_> {
        let n: usize = self.shape.iter().product();
        let sc = [self.shape[0], self.shape[1], self.shape[2], 1];
        unsafe {
            match self.f {
                CacheFormat::F32 => {
                    View::strided(std::slice::from_raw_parts(self.p as *const f32, n), 0, self.shape, self.strides)
                        .unwrap()
                        .into()
                }
                CacheFormat::F16 => View::strided(
                    std::slice::from_raw_parts(self.p as *const half::f16, n),
                    0,
                    self.shape,
                    self.strides,
                )
                .unwrap()
                .into(),
                CacheFormat::Bf16 => View::strided(
                    std::slice::from_raw_parts(self.p as *const half::bf16, n),
                    0,
                    self.shape,
                    self.strides,
                )
                .unwrap()
                .into(),
                CacheFormat::Int8 => CacheView::int8_strided(
                    std::slice::from_raw_parts(self.p as *const i8, n),
                    0,
                    self.shape,
                    self.strides,
                    View::strided(&self.s, 0, sc, self.ss).unwrap(),
                )
                .unwrap(),
                f => {
                    let c =
                        CacheView::fp8_strided(std::slice::from_raw_parts(self.p, n), f, 0, self.shape, self.strides)
                            .unwrap();
                    if self.s[0] > 0.0 && std::env::var("ONE").is_err() {
                        c.static_scales(&self.s[..1]).unwrap()
                    } else {
                        c
                    }
                }
            }
        }
    }
}
#[target_feature(enable = "avx512f")]
unsafe fn read(p: *const u8, n: usize, streams: usize) -> f32 {
    use std::arch::x86_64::*;
    let part = n / streams / 4096 * 4096;
    unsafe {
        let mut a = [_mm512_setzero_si512(); 8];
        let mut i = 0;
        while i < part {
            for s in 0..streams {
                let b = p.add(s * part + i);
                for l in 0..8 {
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(l * 64 + 1024) as *const i8);
                    a[l] = _mm512_xor_si512(a[l], _mm512_loadu_si512(b.add(l * 64) as *const _));
                }
            }
            i += 512;
        }
        let mut t = a[0];
        for l in 1..8 {
            t = _mm512_xor_si512(t, a[l]);
        }
        _mm512_reduce_add_epi32(t) as f32
    }
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let keys: usize = args[1].parse().unwrap();
    let (h, kv, d): (usize, usize, usize) =
        (args[2].parse().unwrap(), args[3].parse().unwrap(), args[4].parse().unwrap());
    let rounds: usize = args.get(5).map_or(30, |x| x.parse().unwrap());
    let tq: usize = args.get(6).map_or(1, |x| x.parse().unwrap());
    let only: Option<usize> = std::env::var("ONLY").ok().map(|x| x.parse().unwrap());
    let ctx = match std::env::var("LEVEL") {
        Ok(l) => Context::with_max_isa(Isa::from_name(&l).unwrap()).unwrap(),
        _ => Context::new().unwrap(),
    };
    let mut ws = Workspace::new();
    let (mut q, mut out) = (vec![0f32; tq * h * d], vec![0f32; tq * h * d]);
    for (i, x) in q.iter_mut().enumerate() {
        *x = ((i * 37 % 101) as f32 / 50.0 - 1.0) * 0.3;
    }
    for bhsd in [false, true] {
        let fs = [
            CacheFormat::F32,
            CacheFormat::F16,
            CacheFormat::Bf16,
            CacheFormat::Int8,
            CacheFormat::Fp8E4m3,
            CacheFormat::Fp8E5m2,
        ];
        let ts: Vec<[T; 2]> =
            fs.iter().map(|&f| [T::new(f, [1, keys, kv, d], bhsd), T::new(f, [1, keys, kv, d], bhsd)]).collect();
        let mut best = [f64::MAX; 6];
        let mut lim = 0f64;
        let n = keys * kv * d * 4;
        for r in 0..rounds {
            for (i, [k, v]) in ts.iter().enumerate() {
                if only.is_some_and(|o| o != i) {
                    continue;
                }
                let t = Instant::now();
                attention(
                    &ctx,
                    &Serial,
                    &mut ws,
                    AttentionTensors::new(
                        View::new(&q, [1, tq, h, d]).unwrap(),
                        k.view(),
                        v.view(),
                        ViewMut::new(&mut out, [1, tq, h, d]).unwrap(),
                    ),
                    &AttentionOptions::new().causal(true).lengths(&[keys as i32]),
                )
                .unwrap();
                best[i] = best[i].min(t.elapsed().as_secs_f64());
            }
            let t = Instant::now();
            std::hint::black_box(unsafe { read(ts[0][0].p, n, [1, 2, 4, 8][r % 4]) });
            lim = lim.max(n as f64 / t.elapsed().as_secs_f64() / 1e9);
        }
        let b = [4.0, 2.0, 2.0, 1.0, 1.0, 1.0];
        print!("{} read {lim:.1}:", if bhsd { "bhsd" } else { "bshd" });
        for i in 0..6 {
            print!(
                "  {} {:.3} ms {:.1} GB/s",
                ["f32", "f16", "bf16", "int8", "e4m3", "e5m2"][i],
                best[i] * 1e3,
                2.0 * (keys * kv * d) as f64 * b[i] / best[i] / 1e9
            );
        }
        println!(
            "  int8/bf16 {:.2}  gflops bf16 {:.0}",
            best[3] / best[2],
            4.0 * (keys * h * d * tq) as f64 / best[2] / 1e9
        );
    }
}
