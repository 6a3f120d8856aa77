//! Checks of what says which keys a query may see by position.

use crate::error::{Result, ensure};
use crate::layout::Layout;
use crate::problem::visibility::{Summary, Visibility};

/// Checks every list against the cache, and sums up. The layout has been validated, but for the entries of its table, and the
/// cache is named `k`.
pub(super) fn validate(visibility: &Visibility) -> Result<Summary> {
    let batch = visibility.batch;
    ensure!(
        visibility.lengths.is_some() || !matches!(visibility.layout, Layout::Ring { .. } | Layout::Paged { .. }),
        InvalidValue,
        "lengths is absent, but a ring and pages do not say how many keys a sequence has"
    );
    let lists = [
        ("lengths", visibility.lengths),
        ("kv_starts", visibility.kv_starts),
        ("prefix_lengths", visibility.prefix_lengths),
    ];
    for (name, list) in lists.into_iter().chain([("offsets", visibility.offsets)]) {
        let n = list.map_or(batch, <[i32]>::len);
        ensure!(n == batch, Shape, "{name} has {n} entries, but q has batch = {batch}");
    }
    for (name, list) in lists {
        for (row, &x) in list.unwrap_or(&[]).iter().enumerate() {
            let room = visibility.layout.capacity(&visibility.cache, row);
            ensure!(
                x >= 0 && x as usize <= room,
                OutOfRange,
                "{name}[{row}] is {x}, but k has {} = {room}",
                if room == visibility.cache.shape[1] { "seq" } else { "room for a sequence" }
            );
        }
    }
    let summary = summarize(visibility)?;
    if !visibility.layout.has_table() {
        return Ok(summary);
    }
    for row in (0..batch).filter(|&row| visibility.queries(row) > 0) {
        let (low, length, always_visible) =
            (visibility.first_visible(row), visibility.length(row), visibility.always_visible(row));
        visibility.layout.validate_row(
            "k",
            &visibility.cache,
            row,
            always_visible.0 as usize,
            always_visible.1 as usize,
        )?;
        if low < length {
            visibility.layout.validate_row("k", &visibility.cache, row, low as usize, length as usize)?;
        }
    }
    Ok(summary)
}

/// Sums up lists that are valid in themselves, unless a ring has overwritten what their queries see.
pub(super) fn summarize(visibility: &Visibility) -> Result<Summary> {
    if matches!(visibility.layout, Layout::Ring { .. }) {
        for row in (0..visibility.batch).filter(|&row| visibility.queries(row) > 0) {
            check_retained(visibility, row)?;
        }
    }
    Ok(visibility.summarize())
}

/// Checks that a ring has not overwritten what the queries of a sequence see.
fn check_retained(visibility: &Visibility, row: usize) -> Result<()> {
    let retained = visibility.retained_from(row);
    let Layout::Ring { sink_tokens } = visibility.layout else { return Ok(()) };
    if retained == 0 {
        return Ok(());
    }
    let start = visibility.kv_starts.map_or(0, |s| s[row] as i64);
    let queries = visibility.queries(row);
    // The first query is the one that sees the farthest back, unless queries have positions of their own.
    let others = if visibility.query_positions.is_some() { queries } else { 1 };
    let position = (0..others).map(|query| visibility.position(row, query)).min().unwrap_or(0);
    let wanted = match visibility.window_left {
        None if queries == 1 => retained,
        None => start,
        Some(left) => start.max(position - left),
    };
    // Whatever their positions, the queries see keys of their own.
    let wanted = match visibility.own_keys(row) {
        Some(own) if queries > 1 => wanted.min(start.max(own.first())),
        _ => wanted,
    };
    ensure!(
        wanted >= retained,
        Capacity,
        "{}, so the first query of sequence {row} sees keys from {wanted} on, but of its {} tokens the ring retains those from {retained} \
         on: {}",
        match visibility.window_left {
            None => format!("window_left is absent and sequence {row} has {queries} queries"),
            Some(left) => format!("window_left is {left} and the first query stands at position {position}"),
        },
        visibility.length(row),
        match position - retained {
            most @ 0.. => format!("give a window_left of at most {most}, or a ring of more slots"),
            _ => "no window_left is small enough, give a ring of more slots".into(),
        }
    );
    let prefix = visibility.prefix_lengths.map_or(0, |p| p[row] as i64);
    ensure!(
        prefix <= sink_tokens as i64,
        Capacity,
        "prefix_lengths[{row}] is {prefix}, but the ring keeps {sink_tokens} sink tokens of sequence {row}"
    );
    Ok(())
}
