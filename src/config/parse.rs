//! Texts to checked values, with errors that name the setting as its user wrote it.

use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use super::raw::Layers;
use super::setting::Setting;
use super::setting::setting_error;
use crate::error::{Error, Result};
use crate::tables::WindowWidth;

/// A whole number, or whatever else its type reads from text.
pub(super) fn parsed<T: FromStr>(layers: &Layers, setting: Setting, accepted: &str) -> Result<T> {
    layers.text(setting).trim().parse().map_err(|_| refused(layers, setting, accepted))
}

pub(super) fn duration(layers: &Layers, setting: Setting, accepted: &str) -> Result<Duration> {
    humantime::parse_duration(layers.text(setting).trim()).map_err(|_| refused(layers, setting, accepted))
}

pub(super) fn window(layers: &Layers) -> Result<WindowWidth> {
    let accepted = "whole minutes that divide a day, such as 15m, 1h, 6h or 1d";
    let length = duration(layers, Setting::Window, accepted)?;
    WindowWidth::new(length).ok_or_else(|| refused(layers, Setting::Window, accepted))
}

pub(super) fn bytes(layers: &Layers, setting: Setting, accepted: &str) -> Result<usize> {
    parse_bytes(layers.text(setting)).ok_or_else(|| refused(layers, setting, accepted))
}

pub(super) fn rate(layers: &Layers) -> Result<Option<NonZeroU32>> {
    let setting = Setting::BackfillRowsPerSecond;
    // The word lets a flag undo what a file or variable says.
    if layers.text(setting).trim() == "unlimited" {
        return Ok(None);
    }
    parsed(layers, setting, "1 or more rows per second, or `unlimited`").map(Some)
}

fn parse_bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: usize = match unit.trim_start() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(factor)
}

pub(super) fn refused(layers: &Layers, setting: Setting, accepted: &str) -> Error {
    setting_error(&layers.name(setting), without_password(layers.text(setting)), accepted)
}

/// The text with the password of a URL hidden: a URL may have been given to the wrong setting.
fn without_password(text: &str) -> String {
    let hidden = text.split_once("://").and_then(|(scheme, rest)| {
        let (login, host) = rest.rsplit_once('@')?;
        let (user, _) = login.split_once(':')?;
        Some(format!("{scheme}://{user}:***@{host}"))
    });
    hidden.unwrap_or_else(|| text.to_owned())
}
