//! What is learnt from.

use std::fs;
use std::path::Path;

use crate::{done, finetune, golden, json_lines, read, run, scratch, text};

#[test]
fn a_text_is_learnt_and_its_curve_written() {
    let (model, text, out) = (golden("llama/base"), text(), scratch("text"));
    let arguments = ["--model", &model, "--data", &text, "--out", &out, "--device", "cpu", "--targets", "all-linear"];
    let output = done(&[&arguments[..], &["--steps", "60", "--seq", "32", "--lr", "1e-2"]].concat());
    assert!(output.out.contains("9723 tokens of text in 303 pieces"), "{}", output.out);
    assert_eq!(output.err.lines().count(), 20, "three steps a line: {}", output.err);
    let csv = String::from_utf8(read(&out, "loss.csv")).expect("UTF-8");
    let mut lines = csv.lines();
    assert_eq!(lines.next(), Some("step,loss,grad_norm,tokens_per_second"));
    let losses: Vec<f64> = lines
        .enumerate()
        .map(|(step, line)| {
            let mut cells = line.split(',');
            assert_eq!(cells.next(), Some(step.to_string().as_str()));
            cells.next().expect("a loss").parse().expect("a number")
        })
        .collect();
    assert_eq!(losses.len(), 60);
    assert!((losses[0] - 128f64.ln()).abs() < 1.5, "an untrained model is near ln 128: {}", losses[0]);
    assert!(losses[50..].iter().all(|loss| *loss < losses[0] - 1.0), "{losses:?}");
    let svg = String::from_utf8(read(&out, "loss.svg")).expect("UTF-8");
    for part in ["<svg", "loss (nats per token)", "\nstep\n", "</svg>"] {
        assert!(svg.contains(part), "`{part}` is missing from the curve");
    }
    let long = svg
        .split("<polyline")
        .filter(|line| line.split_once('>').is_some_and(|(tag, _)| tag.matches(',').count() >= 60));
    assert_eq!(long.count(), 2, "the losses and their smoothed curve");
}

#[test]
fn every_epoch_has_every_piece_once_in_an_order_of_its_own() {
    use finetune::common::tokens::Tokens;
    use finetune::data::{Data, Shape};
    let file = Path::new(&scratch("epochs")).join("text");
    let bytes: Vec<u8> = (0..12u8).flat_map(|piece| [piece, piece]).chain([99]).collect(); // the last fills no piece
    fs::write(&file, bytes).expect("a file");
    let data = |seed| {
        let shape = Shape { batch: Some(4), seq: Some(2), seed, vocab: 128 };
        Data::open(&file, &Tokens::Bytes, &shape).expect("it can be read")
    };
    let epochs = |mut data: Data| -> Vec<Vec<u32>> {
        let batches: Vec<_> = (0..9).map(|step| data.batch(step).ids).collect();
        batches.chunks(3).map(|epoch| epoch.concat().chunks(2).map(|piece| piece[0]).collect()).collect()
    };
    let orders = epochs(data(0));
    for order in &orders {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..12).collect::<Vec<_>>());
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    assert_ne!(orders, epochs(data(1)));
    let mut data = data(0);
    let late = data.batch(7).ids;
    assert_eq!(
        (late, data.batch(1).ids),
        (epochs_batch(&orders, 7), epochs_batch(&orders, 1)),
        "in any order of asking"
    );
}

fn epochs_batch(orders: &[Vec<u32>], step: usize) -> Vec<u32> {
    orders[step / 3][step % 3 * 4..][..4].iter().flat_map(|&piece| [piece, piece]).collect()
}

#[test]
fn ignored_labels_count_for_nothing() {
    use candle_core::{Device, Tensor};
    let folder = scratch("labels");
    let save = |name: &str, ids: Vec<i64>, labels: Vec<i64>| {
        let tensor = |values: Vec<i64>| Tensor::from_vec(values, (1, 1, 6), &Device::Cpu).expect("a tensor");
        let tensors = std::collections::HashMap::from([("input_ids", tensor(ids)), ("labels", tensor(labels))]);
        let path = format!("{folder}/{name}.safetensors");
        candle_core::safetensors::save(&tensors, &path).expect("a file");
        path
    };
    let model = golden("llama/base");
    let loss = |data: &str| {
        let arguments = ["--model", &model, "--data", data, "--out", &folder, "--device", "cpu", "--json"];
        json_lines(&done(&arguments).out)[0]["loss"].as_f64().expect("a number")
    };
    // Causal: what follows the last label that counts cannot matter, nor can a label of the first token.
    let one = loss(&save("one", vec![5, 6, 7, 8, 9, 10], vec![5, 6, 7, -100, -100, -100]));
    let other = loss(&save("other", vec![5, 6, 7, 1, 2, 3], vec![-100, 6, 7, -100, -100, -100]));
    let all = loss(&save("all", vec![5, 6, 7, 8, 9, 10], vec![5, 6, 7, 8, 9, 10]));
    assert_eq!(one, other);
    assert!((one - all).abs() > 1e-3, "{one} {all}");
    let none = save("none", vec![5, 6, 7, 8, 9, 10], vec![5, -100, -100, -100, -100, -100]);
    let output = run(&["--model", &model, "--data", &none, "--out", &folder]);
    assert_eq!(output.status, 3);
    assert!(output.err.contains("every label of step 0 is ignored"), "{}", output.err);
}
