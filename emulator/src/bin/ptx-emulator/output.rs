//! Outcomes as text and as JSON.

use std::fmt::Write as _;

use ptx_emulator::{Counters, KernelInfo, ParseError, Report, Site};

/// A string as JSON has it.
pub fn json_string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if u32::from(c) < 0x20 => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Names and values, in the order of the fields.
fn counters(counters: &Counters) -> Vec<(&'static str, u64)> {
    vec![
        ("instructions", counters.instructions),
        ("mma", counters.mma),
        ("global_loaded", counters.global_loaded),
        ("global_stored", counters.global_stored),
        ("shared_loaded", counters.shared_loaded),
        ("shared_stored", counters.shared_stored),
        ("resident_ctas", counters.resident_ctas.into()),
    ]
}

pub fn json_kernel(name: &str, info: &KernelInfo<'_>, errors: &[ParseError]) -> String {
    let parameters = info.parameters.iter().map(|parameter| {
        let (name, offset, bytes) = (json_string(&parameter.name), parameter.offset, parameter.bytes);
        format!("{{\"name\":{name},\"offset\":{offset},\"bytes\":{bytes}}}")
    });
    let errors = errors
        .iter()
        .map(|error| format!("{{\"ptx_line\":{},\"message\":{}}}", error.line, json_string(&error.message)));
    format!(
        "{{\"name\":{},\"parameters\":[{}],\"instructions\":{},\"registers\":{},\"predicates\":{},\"shared_bytes\":{},\
         \"local_bytes\":{},\"not_implemented\":[{}]}}",
        json_string(name),
        parameters.collect::<Vec<_>>().join(","),
        info.instructions,
        info.registers,
        info.predicates,
        info.shared_bytes,
        info.local_bytes,
        errors.collect::<Vec<_>>().join(",")
    )
}

fn json_site(site: Option<&Site>) -> String {
    let Some(Site { cta: [x, y, z], warp, lane, ptx_line, instruction, source }) = site else {
        return "null".to_owned();
    };
    let lane = lane.map_or("null".to_owned(), |lane| lane.to_string());
    let source = source.as_deref().map_or("null".to_owned(), json_string);
    let instruction = json_string(instruction);
    format!(
        "{{\"cta\":[{x},{y},{z}],\"warp\":{warp},\"lane\":{lane},\"ptx_line\":{ptx_line},\"instruction\":{instruction},\
         \"source\":{source}}}"
    )
}

/// What came of a launch.
pub fn outcome(
    kernel: &str,
    seed: u64,
    seeds: usize,
    result: &Result<Counters, Box<Report>>,
    notes: &[String],
    json: bool,
) -> String {
    if json {
        let mut fields = vec![format!("\"kernel\":{}", json_string(kernel)), format!("\"seed\":{seed}")];
        match result {
            Ok(found) => {
                let rows: Vec<_> = counters(found).iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
                fields.push(format!("\"report\":null,\"counters\":{{{}}}", rows.join(",")));
            }
            Err(report) => fields.push(format!(
                "\"report\":{{\"rule\":\"{:?}\",\"message\":{},\"site\":{},\"other\":{}}},\"counters\":null",
                report.rule,
                json_string(&report.message),
                json_site(report.site.as_ref()),
                json_site(report.other.as_ref())
            )),
        }
        let notes: Vec<_> = notes.iter().map(|note| json_string(note)).collect();
        fields.push(format!("\"notes\":[{}]", notes.join(",")));
        return format!("{{{}}}\n", fields.join(","));
    }
    let mut text = String::new();
    match result {
        Ok(found) => {
            let _ = match seeds {
                1 => writeln!(text, "{kernel}: no rule broken (seed {seed})"),
                _ => writeln!(text, "{kernel}: no rule broken by any of {seeds} seeds; the last:"),
            };
            for (name, value) in counters(found) {
                let _ = writeln!(text, "  {name:<14} {value:>14}");
            }
        }
        Err(report) => {
            let _ = writeln!(text, "{report}\n  with seed {seed}");
        }
    }
    for note in notes {
        let _ = writeln!(text, "{note}");
    }
    text
}
