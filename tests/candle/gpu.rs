//! The op on a GPU: what the CPU tests ask, on candle's device and stream.

use candle_core::{DType, Device, Result, Tensor};
use fused_lora::Error;
use fused_lora::candle::{cause, lora};

use crate::case::{Case, bits};
use crate::{projections, routes};

const ALL: [bool; 3] = [true; 3];

/// A device, or one line that says why the test does not run.
fn device(test: &str) -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var_os("FUSED_LORA_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "{test}: {error}, and FUSED_LORA_REQUIRE_GPU is set");
            println!("{test}\nSKIPPED: no GPU ({error})");
            None
        }
    }
}

#[test]
fn gradients_on_a_gpu() -> Result<()> {
    let Some(device) = device("gradients_on_a_gpu") else { return Ok(()) };
    for (dtype, adapter) in
        [(DType::F16, DType::F16), (DType::BF16, DType::BF16), (DType::F16, DType::F32), (DType::BF16, DType::F32)]
    {
        for (tokens, sizes) in [(&[7][..], (5, 9, 3)), (&[2, 65], (96, 64, 8)), (&[2, 3, 40], (130, 256, 16))] {
            let case = Case::new(tokens, sizes, dtype, adapter)?.to_device(&device)?;
            case.check(ALL, &format!("{tokens:?} {sizes:?} {dtype:?}, adapters {adapter:?}"));
            case.check([false, true, false], "A alone");
        }
    }
    Ok(())
}

#[test]
fn layouts_on_a_gpu() -> Result<()> {
    let Some(device) = device("layouts_on_a_gpu") else { return Ok(()) };
    let (wide, n, r) = (Case::new(&[40], (48, 96, 8), DType::BF16, DType::F32)?.to_device(&device)?, 48, 8);
    let views: [(&str, Tensor); 4] = [
        ("columns", wide.x.narrow(1, 5, 64)?),
        ("tokens", wide.x.narrow(0, 3, 17)?),
        ("transposed", wide.x.t()?),
        ("broadcast", wide.x.narrow(0, 2, 1)?.broadcast_as((9, 96))?),
    ];
    for (name, x) in views {
        let (m, k) = x.dims2()?;
        let plain = Case::new(&[m], (n, k, r), DType::BF16, DType::F32)?.to_device(&device)?;
        Case { x, ..plain }.check([false, true, true], name);
    }
    Ok(())
}

#[test]
fn projections_on_a_gpu() -> Result<()> {
    let Some(device) = device("projections_on_a_gpu") else { return Ok(()) };
    let mixed = [DType::BF16, DType::F32, DType::BF16];
    projections::judge_all(
        &device,
        &[(DType::BF16, [DType::BF16; 3]), (DType::F16, [DType::F32; 3]), (DType::BF16, mixed)],
    )
}

#[test]
fn routes_on_a_gpu() -> Result<()> {
    let Some(device) = device("routes_on_a_gpu") else { return Ok(()) };
    routes::judge_all(&device, &[(DType::BF16, DType::BF16), (DType::F16, DType::F16), (DType::BF16, DType::F32)])?;
    routes::judge_full(&device)
}

/// One workspace for all threads of a stream, one for each stream, and the same bits in all of them.
#[test]
fn threads_and_streams_on_a_gpu() -> Result<()> {
    if device("threads_and_streams_on_a_gpu").is_none() {
        return Ok(());
    }
    let case = Case::new(&[300], (200, 256, 16), DType::BF16, DType::F32)?;
    let results = |device: &Device| -> Result<Vec<Vec<u64>>> {
        let results = case.to_device(device)?.run(ALL, Case::fused)?;
        Ok(std::iter::once(&results.y).chain(results.gradients.iter().flatten()).map(bits).collect())
    };
    let expected = results(&Device::new_cuda(0)?)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..24) // more streams than workspaces are kept for
            .map(|_| scope.spawn(|| Device::new_cuda_with_stream(0).and_then(|device| results(&device))))
            .collect();
        for thread in threads {
            assert!(thread.join().expect("no panic")? == expected);
        }
        Ok(())
    })
}

#[test]
fn refusals_on_a_gpu() -> Result<()> {
    let Some(device) = device("refusals_on_a_gpu") else { return Ok(()) };
    let case = Case::new(&[4], (8, 8, 2), DType::BF16, DType::BF16)?.to_device(&device)?;
    let refused = |w: &Tensor, x: &Tensor| lora(x, w, &case.a, &case.b, 1.0, None).expect_err("refused");
    let wide = case.w.to_dtype(DType::F32)?;
    assert!(matches!(cause(&refused(&wide, &case.x)), Some(Error::ArgumentDtype { arg: "w", .. })));
    let none = case.x.narrow(0, 0, 0)?;
    assert_eq!(cause(&refused(&case.w, &none)), Some(&Error::ZeroDimension { arg: "x", axis: "rows" }));
    let again = case.w.to_device(&Device::Cpu)?.to_device(&Device::new_cuda(0)?)?;
    assert_eq!(cause(&refused(&again, &case.x)), Some(&Error::ForeignContext { arg: "w" }));
    let error = refused(&case.w.to_device(&Device::Cpu)?, &case.x);
    assert!(error.to_string().contains("device mismatch"), "{error}");
    Ok(())
}
