// Draws charts with uPlot. Knows nothing of the API: it gets times in seconds, values (null where there are none) and
// names, and says what range was chosen with the mouse.

import { DASHES, announce, clean, color, h } from './dom.js';
import * as format from './format.js';

const { uPlot } = globalThis;
const font = (size, weight = '') => `${weight} ${size}px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif`;
/** How an axis writes times with steps of so many seconds, and below it what changes with a year or a day. */
const stamps = (step, each, year, day = null) => [step, each, year, null, day, null, null, null, 1];
const TIMES = [
	stamps(31536000, '{YYYY}', null),
	stamps(2419200, '{MMM}', '\n{YYYY}'),
	stamps(86400, '{D} {MMM}', '\n{YYYY}'),
	stamps(60, '{HH}:{mm}', '\n{D} {MMM} {YYYY}', '\n{D} {MMM}'),
	stamps(1, '{HH}:{mm}:{ss}', '\n{D} {MMM} {YYYY}', '\n{D} {MMM}'),
];
const NO_POINTS = { show: false };

/** Colours of n bins, from light to dark: they are told apart without hues too. */
export const rampColors = (n) =>
	Array.from({ length: n }, (_, index) => {
		const place = n > 1 ? index / (n - 1) : 0.5;
		return `hsl(${55 + 195 * place} 48% ${86 - 56 * place}%)`;
	});

/** The usual distance of times; null, if there are less than two. */
export function stepOf(times) {
	const steps = times.slice(1).map((at, index) => at - times[index]);
	return steps.sort((a, b) => a - b)[Math.floor(steps.length / 2)] ?? null;
}

/**
 * Puts columns with times of their own beside each other: [times, column, ...]. Where one lacks a time it gets
 * undefined, which draws no gap; where it has nothing for more than 2.5 steps it gets a null, which breaks its line.
 */
export function align(all) {
	const maps = all.map(({ times, columns }) => {
		const step = stepOf(times) ?? Infinity;
		const found = new Map(times.map((at, index) => [at, columns.map((column) => column[index] ?? null)]));
		times.forEach((at, index) => {
			if (times[index + 1] - at > step * 2.5) found.set(at + step, columns.map(() => null));
		});
		return { found, columns };
	});
	const times = [...new Set(maps.flatMap(({ found }) => [...found.keys()]))].sort((a, b) => a - b);
	return [times, ...maps.flatMap(({ found, columns }) => columns.map((_, at) => times.map((time) => found.get(time)?.[at])))];
}

/** Points without a neighbour would not be seen as a line: they are drawn as dots. */
function lonely(u, index) {
	const values = u.data[index];
	const known = values.map((_, at) => at).filter((at) => values[at] !== undefined);
	const has = (at) => (values[at] ?? null) !== null;
	return known.filter((at, place) => has(at) && !has(known[place - 1]) && !has(known[place + 1]));
}

function axes(formatValue, incrs) {
	const grid = { stroke: color('--grid'), width: 1 };
	const common = { stroke: color('--muted'), grid, ticks: { ...grid, size: 4 }, font: font(11), gap: 4 };
	const values = (u, splits) => splits.map(formatValue);
	const size = (u, texts) => Math.max(40, ...(texts ?? []).map((text) => text.length * 6.4 + 14));
	return [{ ...common, values: TIMES, space: 64, size: 40 }, { ...common, values, size, space: 32, ...(incrs && { incrs }) }];
}

const textOf = (node) => (node.childElementCount ? [...node.children].map(textOf).join(' ') : node.textContent);

/** A box beside the pointer, or beside the time that was reached with the arrow keys. */
function tip(fill) {
	const box = h('div.tip', { hidden: true });
	const setCursor = (u) => {
		const { idx, left } = u.cursor;
		const isHere = u.over.matches(':hover') || u.root.parentElement?.matches(':focus-visible');
		box.hidden = (idx ?? null) === null || left < 0 || !isHere;
		if (box.hidden) return;
		box.replaceChildren(...fill(idx));
		const at = u.valToPos(u.data[0][idx], 'x');
		const { offsetLeft, clientWidth: width } = u.over;
		const beside = at > width / 2 ? at - 12 - box.offsetWidth : at + 12;
		box.style.left = `${Math.max(-offsetLeft, Math.min(beside, width - box.offsetWidth))}px`;
	};
	return { hooks: { init: (u) => u.over.append(box), setCursor } };
}

/** A chart in `host`: follows its width, can be read with the arrow keys, and has a range chosen by dragging. */
function chart(host, { data, series, bands, from, to, y, height, label, fill, onZoom, onReset, sync, formatValue, incrs, draw, padding, points }) {
	const width = () => Math.max(host.clientWidth, 120);
	const setSelect = (u) => {
		const { left, width: wide } = u.select;
		if (wide < 4) return;
		u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
		onZoom(u.posToVal(left, 'x'), u.posToVal(left + wide, 'x'));
	};
	const plot = new uPlot(
		{
			width: width(),
			height,
			series: [{}, ...series],
			bands,
			padding,
			legend: { show: false },
			tzDate: (at) => uPlot.tzDate(new Date(at * 1000), 'Etc/UTC'),
			scales: { x: { time: true, range: () => [Math.min(from(), data()[0][0] ?? Infinity), to()] }, y },
			axes: axes(formatValue, incrs),
			cursor: {
				drag: { x: Boolean(onZoom), y: false, setScale: false },
				y: false,
				points: points ?? { size: 6 },
				bind: { dblclick: () => () => onReset?.() },
				sync: { key: sync, filters: { pub: (type) => type === 'mousemove' || type === 'mouseleave' } },
			},
			plugins: [tip(fill)],
			hooks: { setSelect: [setSelect], draw: [draw] },
		},
		data(),
		host,
	);
	host.tabIndex = 0;
	host.setAttribute('role', 'group');
	host.setAttribute('aria-roledescription', 'chart');
	host.setAttribute('aria-label', label);
	host.onkeydown = (event) => {
		const times = plot.data[0];
		const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
		if (event.key === 'Escape') plot.setCursor({ left: -10, top: -10 });
		if (!(event.key in steps) || !times.length) return;
		event.preventDefault();
		const next = (plot.cursor.idx ?? times.length - 1) + steps[event.key];
		const index = Math.min(Math.max(next, 0), times.length - 1);
		plot.setCursor({ left: plot.valToPos(times[index], 'x'), top: 10 });
		announce(fill(index).map(textOf).join(', '));
	};
	const resize = new ResizeObserver(() => width() !== plot.width && plot.setSize({ width: width(), height }));
	resize.observe(host);
	const destroy = () => {
		resize.disconnect();
		plot.destroy();
	};
	return { plot, set: () => plot.setData(data()), destroy };
}

/**
 * Lines over time. `data()` gives [times, ...], as aligned; each of `lines` has {n, hasBand}: with a band it has three
 * columns (value, lower, upper), else one. `bounds` are drawn as straight lines: {value, label, variable, isShown}.
 */
export function lineChart(host, { lines, bounds = [], min = null, ...rest }) {
	const series = [];
	const bands = [];
	for (const { n, hasBand, isArea } of lines) {
		const stroke = color(`--s${n}`);
		const points = { show: false, size: 7, fill: stroke, filter: lonely };
		series.push({ stroke, width: 1.6, dash: DASHES[n], points, ...(isArea && { fill: `${stroke}24` }) });
		if (!hasBand) continue;
		for (let edge = 0; edge < 2; edge += 1) series.push({ stroke: 'transparent', width: 0, points: NO_POINTS });
		bands.push({ series: [series.length, series.length - 1], fill: `${stroke}29` });
	}
	const range = (u, low, high) => {
		const known = [low, high, min, ...bounds.map(({ value, isShown }) => (isShown ? value : null))].filter(Number.isFinite);
		if (!known.length) return [0, 1];
		const [lowest, highest] = [Math.min(...known), Math.max(...known)];
		const space = (highest - lowest) * 0.08 || Math.abs(highest) * 0.1 || 1;
		return [min === lowest ? lowest : lowest - space, highest + space];
	};
	const draw = ({ ctx, bbox, valToPos }) => {
		const scale = devicePixelRatio;
		ctx.save();
		ctx.font = font(10 * scale);
		ctx.textAlign = 'left';
		ctx.textBaseline = 'bottom';
		ctx.setLineDash([5 * scale, 4 * scale]);
		ctx.lineWidth = scale;
		for (const { value, label, variable } of bounds) {
			const at = valToPos(value, 'y', true);
			if (at < bbox.top || at > bbox.top + bbox.height) continue;
			ctx.strokeStyle = ctx.fillStyle = color(variable);
			ctx.beginPath();
			ctx.moveTo(bbox.left, at);
			ctx.lineTo(bbox.left + bbox.width, at);
			ctx.stroke();
			ctx.fillText(label, bbox.left + 6 * scale, at - 3 * scale);
		}
		ctx.restore();
	};
	return chart(host, { formatValue: format.value, padding: [10, 12, 0, 0], ...rest, series, bands, y: { range }, draw });
}

/** Shares of bins on top of each other, 0 to 1, and beside them those of the whole range. `data()` are running sums. */
export function stackChart(host, { colors, overall, ...rest }) {
	const series = colors.map((fill, at) => ({ stroke: color('--panel'), width: 0.5, points: NO_POINTS, ...(at === 0 && { fill }) }));
	const bands = colors.slice(1).map((fill, at) => ({ series: [at + 2, at + 1], fill }));
	const draw = ({ ctx, bbox, valToPos }) => {
		const scale = devicePixelRatio;
		const left = bbox.left + bbox.width + 8 * scale;
		ctx.save();
		let sum = 0;
		overall.forEach((share, at) => {
			const low = valToPos(sum, 'y', true);
			sum += share;
			ctx.fillStyle = colors[at];
			ctx.fillRect(left, low, 12 * scale, valToPos(sum, 'y', true) - low);
		});
		ctx.fillStyle = color('--muted');
		ctx.font = font(10 * scale);
		ctx.textAlign = 'center';
		ctx.textBaseline = 'bottom';
		ctx.fillText('all', left + 6 * scale, bbox.top - 3 * scale);
		ctx.restore();
	};
	const formatValue = (share) => `${Math.round(share * 100)} %`;
	return chart(host, { ...rest, series, bands, y: { range: [0, 1] }, draw, formatValue, padding: [18, 30, 0, 0], points: NO_POINTS });
}

/** A PNG of charts below each other, each {title, plot, keys: [{text, color, dash}]}. */
export function png(heading, charts) {
	const scale = devicePixelRatio;
	const canvas = h('canvas');
	const ctx = canvas.getContext('2d');
	const widthOf = (text) => ctx.measureText(text).width + 46;
	ctx.font = font(12);
	const keysOf = ({ keys }) => keys.reduce((sum, { text }) => sum + widthOf(text), 0);
	const width = Math.max(widthOf(heading), ...charts.map((part) => Math.max(part.plot.width + 32, keysOf(part))));
	canvas.width = width * scale;
	canvas.height = charts.reduce((sum, { plot }) => sum + plot.height + 50, 56) * scale;
	ctx.scale(scale, scale);
	ctx.fillStyle = color('--panel');
	ctx.fillRect(0, 0, width, canvas.height);
	const write = (text, x, y, variable, size = 12, weight = '') => {
		ctx.font = font(size, weight);
		ctx.fillStyle = color(variable);
		ctx.fillText(text, x, y);
	};
	write(heading, 16, 26, '--muted');
	let y = 56;
	for (const { title, plot, keys } of charts) {
		write(clean(title), 16, y, '--text', 14, 600);
		let x = 16;
		for (const { text, color: stroke, dash } of keys) {
			ctx.strokeStyle = stroke;
			ctx.lineWidth = dash ? 2 : 9;
			ctx.setLineDash(dash ?? []);
			ctx.beginPath();
			ctx.moveTo(x, y + 16);
			ctx.lineTo(x + 22, y + 16);
			ctx.stroke();
			write(text, x + 28, y + 20, '--text');
			x += widthOf(text);
		}
		ctx.drawImage(plot.ctx.canvas, 16, y + 30, plot.width, plot.height);
		y += plot.height + 50;
	}
	return new Promise((done) => canvas.toBlob(done));
}

/** Lets the browser save something. */
export function save(blob, filename) {
	const link = h('a', { href: URL.createObjectURL(blob), download: filename });
	link.click();
	setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
