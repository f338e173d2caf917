// The values of a chart as a table, and as CSV. Knows what columns each kind of drift has.

import { h, name } from './dom.js';
import * as format from './format.js';

/** Columns of a kind: the key of the values, and what it is called. */
const COLUMNS = {
	custom: [['avg', 'mean'], ['lower', 'lower'], ['upper', 'upper']],
	spc: [['avg', 'value']],
};

/** What a chart shows, as a table that `make` makes when it is opened. `remember` is told whether it is. */
export function values(isOpen, make, remember) {
	const element = h('details.values-of', { open: isOpen, test: 'values' }, h('summary', 'Values'));
	element.addEventListener('toggle', () => {
		if (element.open) element.replaceChildren(element.firstChild, make());
		remember?.(element.open);
	});
	return element;
}

/** The table. `parts` are {label, found} of each model; `show` makes a text of a value. */
export function valuesTable(kind, title, parts, show = kind === 'psi' ? format.percent : format.value) {
	const [{ found: first }] = parts;
	const isPsi = kind === 'psi';
	const columns = isPsi
		? first.ids.map((id, bin) => ({ title: `bin ${id}`, found: first, values: first.shares[bin] }))
		: parts.flatMap(({ label, found }) =>
				COLUMNS[kind].map(([key, called]) => ({ title: parts.length > 1 ? `${label}: ${called}` : called, found, values: found[key] })),
			);
	for (const column of columns) column.places = new Map(column.found.times.map((at, index) => [at, index]));
	const times = [...new Set(parts.flatMap(({ found }) => found.times))].sort((a, b) => a - b);
	const row = (title, values) => h('tr', h('th', { scope: 'row' }, title), values.map((value) => h('td', show(value))));
	return h(
		'div.scroll',
		{ tabindex: 0, role: 'region', 'aria-label': 'Values' },
		h(
			'table.values',
			{ test: 'values-table' },
			h('caption.sr', 'Values of ', name(title)),
			h('thead', h('tr', ['Time (UTC)', ...columns.map((column) => column.title)].map((text) => h('th', { scope: 'col' }, name(text))))),
			h('tbody', times.map((at) => row(format.time(at), columns.map(({ places, values }) => values[places.get(at)])))),
			isPsi && h('tfoot', row('All', first.overall)),
		),
	);
}

/** A text cell: a spreadsheet shall not take the text of others for a formula. */
function textCell(text) {
	const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
	return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** CSV of panels: {title, parts: [{model, found}]}. */
export function csv(kind, panels) {
	const ends = { custom: 'avg,lower_bound,upper_bound', spc: 'value', psi: 'bin_id,proportion,overall_proportion' };
	const lines = [`space,name,version,${kind === 'custom' ? 'metric' : 'feature'},created_at,${ends[kind]}`];
	for (const { title, parts } of panels) {
		for (const { model, found } of parts) {
			const start = [model.space, model.name, model.version, title].map(textCell);
			found.times.forEach((at, row) => {
				const add = (...cells) => lines.push([...start, format.rfc3339(at), ...cells].join(','));
				if (kind === 'psi') found.ids.forEach((id, bin) => add(textCell(id), found.shares[bin][row], found.overall[bin]));
				else add(...COLUMNS[kind].map(([key]) => found[key][row]));
			});
		}
	}
	return `${lines.join('\r\n')}\r\n`;
}
