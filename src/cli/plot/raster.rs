//! A page of pixels for plotters to draw on, as it does on SVG's. Its own bitmaps have no smooth edges, and their
//! letters are not where those of its SVG are.

use std::convert::Infallible;
use std::f32::consts::TAU;

use ab_glyph::{Font as _, FontRef, Glyph, GlyphId, InvalidFont, Point, PxScale, ScaleFont as _, point};
use ab_glyph_rasterizer::Rasterizer;
use plotters_backend::text_anchor::{HPos, VPos};
use plotters_backend::{
    BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingBackend, DrawingErrorKind,
};

/// The letters; `assets/README.md` says where they come from.
const FONT: &[u8] = include_bytes!("../../../assets/DejaVuSans-subset.ttf");

/// Bytes of a pixel: red, green, blue.
pub(super) const PIXEL: usize = 3;

/// Coverage below which a pixel is not touched: rounding of what is outside a shape.
const NOTHING: f32 = 1.0 / 512.0;

/// What stands for a letter that the font doesn't have: a box.
const UNKNOWN: char = '\u{25a1}';

/// Corners of what stands for a circle.
const CORNERS: u16 = 24;

type Done = Result<(), DrawingErrorKind<Infallible>>;

/// A page whose pixels are the caller's, row by row from the top.
pub(super) struct Page<'a> {
    pixels: &'a mut [u8],
    size: (u32, u32),
    font: FontRef<'static>,
}

impl<'a> Page<'a> {
    pub(super) fn new(pixels: &'a mut [u8], size: (u32, u32)) -> Result<Self, InvalidFont> {
        Ok(Self { pixels, size, font: FontRef::try_from_slice(FONT)? })
    }

    /// Lays a colour over a pixel; what is outside the page is nowhere.
    fn blend(&mut self, (x, y): BackendCoord, color: BackendColor, coverage: f32) {
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
        if x >= self.size.0 {
            return;
        }
        let start = (y as usize * self.size.0 as usize + x as usize) * PIXEL;
        let Some(pixel) = self.pixels.get_mut(start..start + PIXEL) else { return };
        let part = color.alpha * f64::from(coverage.min(1.0));
        for (below, over) in pixel.iter_mut().zip(<[u8; PIXEL]>::from(color.rgb)) {
            let mixed = f64::from(*below) * (1.0 - part) + f64::from(over) * part;
            *below = mixed.round() as u8;
        }
    }

    /// Fills the union of outlines that all turn the same way.
    fn fill(&mut self, outlines: &[Vec<Point>], color: BackendColor) {
        let (width, height) = (self.size.0 as f32, self.size.1 as f32);
        let within =
            |corner: &Point| point(corner.x.clamp(-2.0, width + 2.0), corner.y.clamp(-2.0, height + 2.0));
        let outlines: Vec<Vec<Point>> =
            outlines.iter().map(|outline| outline.iter().map(within).collect()).collect();
        let corners = || outlines.iter().flatten();
        let left = corners().map(|corner| corner.x).fold(f32::INFINITY, f32::min).floor() - 1.0;
        let top = corners().map(|corner| corner.y).fold(f32::INFINITY, f32::min).floor() - 1.0;
        let right = corners().map(|corner| corner.x).fold(f32::NEG_INFINITY, f32::max).ceil() + 2.0;
        let bottom = corners().map(|corner| corner.y).fold(f32::NEG_INFINITY, f32::max).ceil() + 2.0;
        if left > right || top > bottom {
            return;
        }
        let mut rasterizer = Rasterizer::new((right - left) as usize, (bottom - top) as usize);
        let origin = point(left, top);
        for outline in &outlines {
            for (from, to) in outline.iter().zip(outline.iter().cycle().skip(1)) {
                rasterizer.draw_line(*from - origin, *to - origin);
            }
        }
        rasterizer.for_each_pixel_2d(|x, y, coverage| {
            if coverage > NOTHING {
                self.blend((left as i32 + x as i32, top as i32 + y as i32), color, coverage);
            }
        });
    }

    /// Draws lines from point to point, with round corners.
    fn stroke(&mut self, points: &[Point], color: BackendColor, width: u32) {
        let half = width as f32 / 2.0;
        // The middle of a pixel, so that a line of odd width has sharp edges.
        let shift = (width % 2) as f32 / 2.0;
        let points: Vec<Point> = points.iter().map(|at| *at + point(shift, shift)).collect();
        let mut outlines = Vec::new();
        for (from, to) in points.iter().zip(points.iter().skip(1)) {
            let along = *to - *from;
            let length = along.x.hypot(along.y);
            if length > 0.0 {
                let aside = point(-along.y * half / length, along.x * half / length);
                outlines.push(vec![*from + aside, *to + aside, *to - aside, *from - aside]);
            }
        }
        let corners = points.iter().skip(1).take(points.len().saturating_sub(2));
        outlines.extend(corners.map(|corner| circle(*corner, half)));
        self.fill(&outlines, color);
    }

    /// The size of letters, whose style names the height of a line as plotters' SVG has it.
    fn scale(&self, style: &impl BackendTextStyle) -> (f32, PxScale) {
        let em = (style.size() / 1.24) as f32;
        let units = self.font.units_per_em().unwrap_or(1.0);
        (em, PxScale::from(em * self.font.height_unscaled() / units))
    }

    /// The letters of a text on a line that begins at 0, 0, and its length.
    fn letters(&self, text: &str, scale: PxScale) -> (Vec<Glyph>, f32) {
        let font = self.font.as_scaled(scale);
        let (mut letters, mut x) = (Vec::new(), 0.0);
        for letter in text.chars() {
            let known = Some(font.glyph_id(letter)).filter(|id| *id != GlyphId::default());
            let id = known.unwrap_or_else(|| font.glyph_id(UNKNOWN));
            letters.push(id.with_scale_and_position(scale, point(x, 0.0)));
            // Without kerning: the font has it in a table that ab_glyph doesn't read.
            x += font.h_advance(id);
        }
        (letters, x)
    }
}

/// The outline of a circle; it turns as those of lines do.
fn circle(middle: Point, radius: f32) -> Vec<Point> {
    let corner = |corner: u16| {
        let (sin, cos) = (-TAU * f32::from(corner) / f32::from(CORNERS)).sin_cos();
        middle + point(cos * radius, sin * radius)
    };
    (0..CORNERS).map(corner).collect()
}

fn at((x, y): BackendCoord) -> Point {
    point(x as f32, y as f32)
}

impl DrawingBackend for Page<'_> {
    type ErrorType = Infallible;

    fn get_size(&self) -> (u32, u32) {
        self.size
    }

    fn ensure_prepared(&mut self) -> Done {
        Ok(())
    }

    fn present(&mut self) -> Done {
        Ok(())
    }

    fn draw_pixel(&mut self, at: BackendCoord, color: BackendColor) -> Done {
        self.blend(at, color, 1.0);
        Ok(())
    }

    fn draw_line<S: BackendStyle>(&mut self, from: BackendCoord, to: BackendCoord, style: &S) -> Done {
        self.stroke(&[at(from), at(to)], style.color(), style.stroke_width());
        Ok(())
    }

    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        path: I,
        style: &S,
    ) -> Done {
        let points: Vec<Point> = path.into_iter().map(at).collect();
        self.stroke(&points, style.color(), style.stroke_width());
        Ok(())
    }

    fn draw_rect<S: BackendStyle>(
        &mut self,
        from: BackendCoord,
        to: BackendCoord,
        style: &S,
        fill: bool,
    ) -> Done {
        if !fill {
            let corners = [from, (to.0, from.1), to, (from.0, to.1), from].map(at);
            self.stroke(&corners, style.color(), style.stroke_width());
            return Ok(());
        }
        for y in from.1.min(to.1)..from.1.max(to.1) {
            for x in from.0.min(to.0)..from.0.max(to.0) {
                self.blend((x, y), style.color(), 1.0);
            }
        }
        Ok(())
    }

    fn draw_circle<S: BackendStyle>(
        &mut self,
        middle: BackendCoord,
        radius: u32,
        style: &S,
        fill: bool,
    ) -> Done {
        let outline = circle(at(middle), radius as f32);
        if fill {
            self.fill(&[outline], style.color());
        } else {
            self.stroke(&outline, style.color(), style.stroke_width());
        }
        Ok(())
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        corners: I,
        style: &S,
    ) -> Done {
        self.fill(&[corners.into_iter().map(at).collect()], style.color());
        Ok(())
    }

    fn draw_text<S: BackendTextStyle>(&mut self, text: &str, style: &S, place: BackendCoord) -> Done {
        let (em, scale) = self.scale(style);
        let (letters, length) = self.letters(text, scale);
        let anchor = style.anchor();
        let x = match anchor.h_pos {
            HPos::Left => 0.0,
            HPos::Center => -length / 2.0,
            HPos::Right => -length,
        };
        // Of the line that the letters stand on.
        let y = match anchor.v_pos {
            VPos::Top => em * 0.76,
            VPos::Center => em * 0.32,
            VPos::Bottom => em * -0.27,
        };
        let (color, turn) = (style.color(), style.transform());
        for mut letter in letters {
            letter.position = point(letter.position.x + x, y.round());
            let Some(outline) = self.font.outline_glyph(letter) else { continue };
            let corner = outline.px_bounds().min;
            outline.draw(|x, y, coverage| {
                if coverage > NOTHING {
                    let (x, y) = turn.transform(corner.x as i32 + x as i32, corner.y as i32 + y as i32);
                    self.blend((place.0 + x, place.1 + y), color, coverage);
                }
            });
        }
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(
        &self,
        text: &str,
        style: &S,
    ) -> Result<(u32, u32), DrawingErrorKind<Infallible>> {
        let (em, scale) = self.scale(style);
        Ok((self.letters(text, scale).1.ceil() as u32, em.ceil() as u32))
    }
}
