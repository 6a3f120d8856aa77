//! A plot of a report: limits as lines, every kernel and shape as a point below them.
//!
//! For each thread count, the kernels of the best level in the report. Left: the roofline, operations per second over
//! operations per byte. Middle: bytes per second over bytes per call. Right: a legend of the numbers. Kernels that
//! convert between types are omitted.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{Bandwidth, Bound, CaseResult, LevelLimits, Report, giga, size, threads};
use super::{Error, Result};
use crate::Isa;

const WIDTH: u32 = 1640;
const HEIGHT: u32 = 720;
const LEGEND: u32 = 470;
const INK: RGBColor = RGBColor(40, 40, 40);
const PALE: RGBColor = RGBColor(120, 120, 120);
const READ: RGBColor = RGBColor(70, 70, 70);
const COPY: RGBColor = RGBColor(170, 120, 40);
/// A palette that is distinguishable with colour blindness.
const TYPES: [(&str, RGBColor); 3] =
    [("f32", RGBColor(0, 90, 181)), ("f16", RGBColor(220, 50, 32)), ("bf16", RGBColor(0, 140, 90))];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Log = plotters::coord::combinators::LogCoord<f64>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Log, Log>>;

/// Draws a report.
///
/// # Errors
/// The report has no data to draw.
pub fn svg(report: &Report) -> Result<String> {
    if report.cases.is_empty() {
        return Err(Error::new("the report has no cases, so there is no picture to draw"));
    }
    let mut rows: Vec<&LevelLimits> = Vec::new();
    // For each thread count, take the best level that was measured; its limits are the lines.
    for limits in &report.limits {
        match rows.iter_mut().find(|row| row.threads == limits.threads) {
            Some(row) if rank(&row.isa) < rank(&limits.isa) => *row = limits,
            Some(_) => {}
            None => rows.push(limits),
        }
    }
    if rows.is_empty() {
        return Err(Error::new("the report has no limits for its cases, so there is no picture to draw"));
    }
    let mut text = String::new();
    draw(report, &rows, &mut text).map_err(|e| Error::new(format!("drawing the picture: {e}")))?;
    Ok(text)
}

/// Later levels are better.
fn rank(isa: &str) -> Option<usize> {
    Isa::ALL.iter().position(|level| level.name() == isa)
}

type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn draw(report: &Report, rows: &[&LevelLimits], text: &mut String) -> Drawn {
    let root = SVGBackend::with_string(text, (WIDTH, HEIGHT * rows.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, limits) in root.split_evenly((rows.len(), 1)).iter().zip(rows) {
        let cpu = report.machine.cpu.as_deref().unwrap_or(&report.machine.architecture);
        let title = format!("kvlane {} on {cpu}, {}, {}", report.kvlane, limits.isa, threads(limits.threads));
        label(area, &title, (20, 14), 20, INK, HPos::Left)?;
        let area = area.margin(44, 6, 6, 6);
        let (charts, legend) = area.split_horizontally(WIDTH - 12 - LEGEND);
        let (roof, memory) = charts.split_horizontally((WIDTH - 12 - LEGEND) * 11 / 20);
        let mut cases: Vec<&CaseResult> = Vec::new();
        for c in &report.cases {
            if c.threads != limits.threads || c.src != c.dst || c.bound.is_none() {
                continue;
            }
            match cases.iter_mut().find(|d| (&d.op, &d.src, &d.case) == (&c.op, &c.src, &c.case)) {
                Some(other) if rank(&other.isa) < rank(&c.isa) => *other = c,
                Some(_) => {}
                None => cases.push(c),
            }
        }
        let mut shapes: Vec<(&str, &str)> = Vec::new();
        for c in &cases {
            if !shapes.contains(&(&c.op, &c.case)) {
                shapes.push((&c.op, &c.case));
            }
        }
        let number = |c: &CaseResult| shapes.iter().position(|&s| s == (&*c.op, &*c.case)).map_or(0, |i| i + 1);
        roofline(&roof, report, limits, &cases, &number)?;
        bandwidth(&memory, limits, &cases, &number)?;
        explain(&legend, &shapes, &cases)?;
    }
    root.present()?;
    Ok(())
}

fn label(area: &Area, text: &str, at: (i32, i32), points: u32, colour: RGBColor, to: HPos) -> Drawn {
    let style = TextStyle::from(("sans-serif", points).into_font()).color(&colour).pos(Pos::new(to, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

fn colour(dtype: &str) -> RGBColor {
    TYPES.into_iter().find(|t| t.0 == dtype).map_or(PALE, |t| t.1)
}

/// A range that holds all values with a margin; never empty.
fn around(values: impl Iterator<Item = f64>, below: f64, above: f64) -> std::ops::Range<f64> {
    let (low, high) = values
        .filter(|x| x.is_finite() && *x > 0.0)
        .fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
    if low <= high { low * below..high * above } else { 0.1..10.0 }
}

/// A chart with both axes logarithmic; labels of the x axis are at powers of `base`.
fn chart<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    names: [&str; 2],
    base: f64,
    tick: &dyn Fn(&f64) -> String,
) -> Drawn<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15).into_font().color(&INK))
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(58)
        .build_cartesian_2d(x.log_scale().base(base), y.log_scale())?;
    chart
        .configure_mesh()
        .bold_line_style(RGBColor(215, 215, 215))
        .light_line_style(RGBColor(242, 242, 242))
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .x_desc(names[0])
        .y_desc(names[1])
        .x_label_formatter(tick)
        .y_label_formatter(&|y| plain(*y))
        .draw()?;
    Ok(chart)
}

/// A label of an axis.
fn plain(x: f64) -> String {
    if x >= 1.0 { format!("{x:.0}") } else { format!("{x}") }
}

/// The read bandwidth of each cache and of memory, each at one working-set size.
fn ceilings(report: &Report, limits: &LevelLimits) -> Vec<Bandwidth> {
    let Some(largest) = limits.read.iter().max_by_key(|b| b.bytes) else {
        return Vec::new();
    };
    let mut chosen: Vec<Bandwidth> = Vec::new();
    for level in 1..=3 {
        let Some(bytes) = report.machine.cache_bytes(level) else { continue };
        // The largest size that fits into this cache with a margin, and not into the previous one.
        let inside = limits.read.iter().filter(|b| b.bytes <= bytes / 2 * limits.threads.max(1));
        if let Some(found) = inside.max_by_key(|b| b.bytes)
            && chosen.iter().all(|c| c.bytes < found.bytes)
        {
            chosen.push(found.clone());
        }
    }
    if chosen.iter().all(|c| c.bytes < largest.bytes) {
        chosen.push(largest.clone());
    }
    chosen
}

fn roofline(
    area: &Area,
    report: &Report,
    limits: &LevelLimits,
    cases: &[&CaseResult],
    number: &dyn Fn(&CaseResult) -> usize,
) -> Drawn {
    let cases: Vec<&&CaseResult> = cases.iter().filter(|c| c.flops > 0.0).collect();
    let intensity = |c: &CaseResult| c.flops / c.bytes as f64;
    let peak = limits.fma.unwrap_or(0.0) / 1e9;
    let roofs = ceilings(report, limits);
    let x = around(cases.iter().map(|c| intensity(c)), 0.5, 2.0);
    let y = around(cases.iter().map(|c| c.operations() / 1e9).chain([peak]), 0.6, 1.8);
    let mut chart = chart(
        area,
        "Roofline: operations against operations a byte",
        x.clone(),
        y.clone(),
        ["operations a byte", "GFLOP/s"],
        10.0,
        &|x| plain(*x),
    )?;
    let mut signs: Vec<Sign> = Vec::new();
    for roof in &roofs {
        let slope = roof.rate / 1e9;
        // From the left or lower edge to the peak.
        let from = x.start.max(y.start / slope);
        let to = (peak / slope).min(x.end);
        if from >= to {
            continue; // Outside of the plot.
        }
        chart.draw_series(LineSeries::new([(from, from * slope), (to, to * slope)], READ.stroke_width(1)))?;
        // Below the line, where there is space.
        let along = |i: i32| {
            let x = from * (to / from).powf(f64::from(i) / 12.0);
            let (px, py) = chart.backend_coord(&(x, x * slope));
            (px + 16, py + 2)
        };
        let text = format!("{} GB/s, read {}", giga(roof.rate), size(roof.bytes));
        signs.push(Sign { places: (0..11).map(along).collect(), text, to: HPos::Left });
    }
    for other in report.limits.iter().filter(|l| l.threads == limits.threads) {
        let Some(fma) = other.fma.map(|fma| fma / 1e9).filter(|fma| y.contains(fma)) else { continue };
        let line = [(x.start, fma), (x.end, fma)];
        if other.isa == limits.isa {
            chart.draw_series(LineSeries::new(line, INK.stroke_width(2)))?;
        } else {
            chart.draw_series(DashedLineSeries::new(line, 4, 4, PALE.stroke_width(1)))?;
        }
        let (px, py) = chart.backend_coord(&(x.end, fma));
        let text = format!("{} GFLOP/s, {} multiply-add", giga(fma * 1e9), other.isa);
        signs.push(Sign { places: vec![(px - 4, py - 8)], text, to: HPos::Right });
    }
    let points: Vec<_> = cases.iter().map(|c| (intensity(c), c.operations() / 1e9, **c)).collect();
    let at = marks(&mut chart, &points)?;
    write(area, signs, at, &cases.iter().map(|c| number(c)).collect::<Vec<_>>())
}

fn bandwidth(area: &Area, limits: &LevelLimits, cases: &[&CaseResult], number: &dyn Fn(&CaseResult) -> usize) -> Drawn {
    let held = |c: &&&CaseResult| c.bound.as_ref().is_some_and(Bound::is_memory);
    let cases: Vec<&&CaseResult> = cases.iter().filter(held).collect();
    let lines = || limits.read.iter().chain(&limits.copy);
    let x = around(cases.iter().map(|c| c.bytes as f64).chain(lines().map(|b| b.bytes as f64)), 0.6, 1.7);
    let y = around(cases.iter().map(|c| c.bandwidth() / 1e9).chain(lines().map(|b| b.rate / 1e9)), 0.7, 1.4);
    let mut chart = chart(
        area,
        "What memory holds back: bytes a second against bytes",
        x,
        y,
        ["bytes a call", "GB/s"],
        4.0,
        &|x| size(x.round() as usize),
    )?;
    let mut signs = Vec::new();
    for (name, list, colour) in [("read", &limits.read, READ), ("copy (read + written)", &limits.copy, COPY)] {
        let mut list: Vec<(f64, f64)> = list.iter().map(|b| (b.bytes as f64, b.rate / 1e9)).collect();
        list.sort_by(|a, b| a.0.total_cmp(&b.0));
        if let Some(first) = list.first() {
            let (px, py) = chart.backend_coord(first);
            // If two lines begin at the same place, one name is placed elsewhere.
            let places = [-12, 14, -28, 30].map(|dy| (px + 8, py + dy)).to_vec();
            signs.push(Sign { places, text: name.to_owned(), to: HPos::Left });
        }
        chart.draw_series(LineSeries::new(list, colour.stroke_width(2)))?;
    }
    let points: Vec<_> = cases.iter().map(|c| (c.bytes as f64, c.bandwidth() / 1e9, **c)).collect();
    let at = marks(&mut chart, &points)?;
    write(area, signs, at, &cases.iter().map(|c| number(c)).collect::<Vec<_>>())
}

/// Draws points: circles for attention, squares for the others. Returns their places on the page and their colours.
fn marks(
    chart: &mut ChartContext<SVGBackend, Cartesian2d<Log, Log>>,
    points: &[(f64, f64, &CaseResult)],
) -> Drawn<Vec<(i32, i32, RGBColor)>> {
    let mut at = Vec::new();
    for &(x, y, case) in points {
        let colour = colour(&case.src);
        if case.op == "attention" {
            chart.draw_series([Circle::new((x, y), 4, colour.filled())])?;
        } else {
            let square = Rectangle::new([(-4, -4), (4, 4)], colour.filled());
            chart.draw_series([EmptyElement::at((x, y)) + square])?;
        }
        let (px, py) = chart.backend_coord(&(x, y));
        at.push((px, py, colour));
    }
    Ok(at)
}

/// The name of a line, with its possible places, best first.
struct Sign {
    places: Vec<(i32, i32)>,
    text: String,
    to: HPos,
}

/// Writes the names of the lines, and the number of each point where there is space, connected with a thin line.
fn write(area: &Area, signs: Vec<Sign>, at: Vec<(i32, i32, RGBColor)>, numbers: &[usize]) -> Drawn {
    // Convert to coordinates of the page, whose origin differs from the area's.
    let (left, top) = area.get_base_pixel();
    let (width, height) = area.dim_in_pixel();
    let (low, high) = ((left + 70, top + 40), (left + width as i32 - 16, top + height as i32 - 56));
    type Rect = (i32, i32, i32, i32);
    let apart = |a: &Rect, b: &Rect| a.2 <= b.0 || b.2 <= a.0 || a.3 <= b.1 || b.3 <= a.1;
    let mut taken: Vec<Rect> = at.iter().map(|&(x, y, _)| (x - 4, y - 4, x + 4, y + 4)).collect();
    for Sign { places, text, to } in signs {
        let long = text.len() as i32 * 6;
        let right = matches!(to, HPos::Right);
        let rect = |(x, y): (i32, i32)| if right { (x - long, y - 7, x, y + 7) } else { (x, y - 7, x + long, y + 7) };
        let free = |&place: &(i32, i32)| {
            let r = rect(place);
            r.2 < high.0 && taken.iter().all(|t| apart(t, &r))
        };
        let first = places.first().copied().unwrap_or_default();
        let place = places.into_iter().find(free).unwrap_or(first);
        taken.push(rect(place));
        label(area, &text, (place.0 - left, place.1 - top), 12, INK, to)?;
    }
    for (&(x, y, colour), number) in at.iter().zip(numbers) {
        let text = number.to_string();
        let (half, tall) = (text.len() as i32 * 4, 6);
        let rect = |(cx, cy): (i32, i32)| (cx - half, cy - tall, cx + half, cy + tall);
        let places = (0..12).flat_map(|ring| {
            let radius = 13.0 + 9.0 * f64::from(ring);
            (0..16).map(move |i| {
                let angle = f64::from(i) * std::f64::consts::TAU / 16.0;
                (x + (radius * angle.cos()) as i32, y - (radius * angle.sin()) as i32)
            })
        });
        let free = |&place: &(i32, i32)| {
            let r = rect(place);
            r.0 > low.0 && r.1 > low.1 && r.2 < high.0 && r.3 < high.1 && taken.iter().all(|t| apart(t, &r))
        };
        let place = places.into_iter().find(free).unwrap_or((x + 13, y));
        taken.push(rect(place));
        let points = vec![(x - left, y - top), (place.0 - left, place.1 - top)];
        if (place.0 - x).pow(2) + (place.1 - y).pow(2) > 15 * 15 {
            area.draw(&PathElement::new(points, colour.mix(0.45)))?;
        }
        label(area, &text, (place.0 - left, place.1 - top), 12, colour, HPos::Center)?;
    }
    Ok(())
}

/// The legend of the numbers, with the share of the limit for each type.
fn explain(area: &Area, shapes: &[(&str, &str)], cases: &[&CaseResult]) -> Drawn {
    let column = |i: usize| 330 + 46 * i as i32;
    label(area, "% of the limit reached", (column(2), 16), 12, INK, HPos::Right)?;
    for (i, (name, colour)) in TYPES.into_iter().enumerate() {
        label(area, name, (column(i), 34), 13, colour, HPos::Right)?;
    }
    area.draw(&Circle::new((16, 16), 4, PALE.filled()))?;
    label(area, "attention", (26, 16), 12, INK, HPos::Left)?;
    area.draw(&Rectangle::new([(96, 12), (104, 20)], PALE.filled()))?;
    label(area, "other operations", (110, 16), 12, INK, HPos::Left)?;
    let (_, height) = area.dim_in_pixel();
    let pitch = ((height as i32 - 60) / (shapes.len() as i32 + 6).max(1)).clamp(10, 17);
    let mut y = 52;
    let mut op = "";
    for (i, &(this, shape)) in shapes.iter().enumerate() {
        if this != op {
            op = this;
            label(area, op, (8, y), 13, INK, HPos::Left)?;
            y += pitch;
        }
        label(area, &(i + 1).to_string(), (26, y), 12, INK, HPos::Right)?;
        label(area, shape, (34, y), 12, INK, HPos::Left)?;
        for (j, (name, colour)) in TYPES.into_iter().enumerate() {
            let case = cases.iter().find(|c| c.op == this && c.case == shape && c.src == name);
            if let Some(reached) = case.and_then(|c| c.reached()) {
                label(area, &format!("{:.0}", reached * 100.0), (column(j), y), 12, colour, HPos::Right)?;
            }
        }
        y += pitch;
    }
    Ok(())
}
