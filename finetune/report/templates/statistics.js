// The figures of `finetune compare` for two lists of verdicts on the same questions (finetune/evaluation/statistics.py and
// finetune/report/comparison.py); a test compares both.

const Z = 1.959964;

// McNemar's exact test, two-sided: exact whole numbers until the last division.
function mcnemar(won, lost) {
  const n = BigInt(won + lost);
  let tail = 0n;
  let combinations = 1n;
  for (let k = 0n; k <= BigInt(Math.min(won, lost)); k++) {
    tail += combinations;
    combinations = (combinations * (n - k)) / (k + 1n);
  }
  return Math.min(1, Number(((2n * tail) << 1000n) >> n) / 2 ** 1000);
}

// Agresti and Min.
function pairedInterval(won, lost, questions) {
  const [n, plus, minus] = [questions + 2, won + 0.5, lost + 0.5];
  const half = (Z * Math.sqrt(plus + minus - (plus - minus) ** 2 / n)) / n;
  return [Math.max(-1, (plus - minus) / n - half), Math.min(1, (plus - minus) / n + half)];
}

// The Mersenne Twister with which numpy's RandomState draws, seeded as it is by a whole number.
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let place = 624;
  return () => {
    if (place === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      place = 0;
    }
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// The percentile bootstrap over whole databases; null for fewer than two.
function bootstrap(points, questions, resamples, seed) {
  const n = points.length;
  if (n < 2) return null;
  const next = twister(seed);
  let mask = n - 1;
  for (let shift = 1; shift < 32; shift *= 2) mask |= mask >>> shift;
  const shares = new Float64Array(resamples);
  for (let i = 0; i < resamples; i++) {
    let [gained, asked] = [0, 0];
    for (let j = 0; j < n; j++) {
      let drawn;
      do drawn = (next() & mask) >>> 0; while (drawn > n - 1);
      gained += points[drawn];
      asked += questions[drawn];
    }
    shares[i] = gained / asked;
  }
  shares.sort();
  return [0.025, 0.975].map((q) => {
    const place = q * (resamples - 1);
    const low = Math.floor(place);
    const [a, b, t] = [shares[low], shares[Math.min(low + 1, resamples - 1)], place - low];
    return t >= 0.5 ? b - (b - a) * (1 - t) : a + (b - a) * t;
  });
}

// right: for each question whether the first and the second answer is right. databases: the number of each question's database.
function difference(first, second, databases, { resamples, seed }) {
  const cells = { won: 0, lost: 0, both: 0, neither: 0 };
  const [points, questions] = [[], []];
  for (let i = 0; i < first.length; i++) {
    cells[first[i] ? (second[i] ? "both" : "lost") : (second[i] ? "won" : "neither")] += 1;
    const database = databases[i];
    points[database] = (points[database] ?? 0) + second[i] - first[i];
    questions[database] = (questions[database] ?? 0) + 1;
  }
  const { won, lost } = cells;
  return {
    ...cells,
    questions: first.length,
    share: (won - lost) / Math.max(first.length, 1),
    overQuestions: pairedInterval(won, lost, first.length),
    databases: points.length,
    overDatabases: bootstrap(points, questions, resamples, seed),
    p: mcnemar(won, lost),
  };
}

// One digit after the point; of two equally near numbers the even one, as Python has it.
function oneDigit(value) {
  const size = Math.abs(value);
  if (Number.isInteger(size * 4) && (size * 4) % 2 === 1) {
    const tenths = Math.floor(size * 10);
    const even = (tenths + (tenths % 2)) / 10;
    return (value < 0 ? "-" : "") + even.toFixed(1);
  }
  return value.toFixed(1);
}

function signed(value) {
  const text = oneDigit(value);
  if (Object.is(value, -0) || (value < 0 && !text.startsWith("-"))) return `-${text.replace("-", "")}`;
  return text.startsWith("-") ? text : `+${text}`;
}

const span = ([low, high]) => `${signed(100 * low)} to ${signed(100 * high)}`;
const pValue = (p) => (p < 0.0001 ? "< 0.0001" : `= ${Number(p.toPrecision(2))}`);

// few: with fewer databases the interval over them is too narrow to be quoted.
function figures(found, few) {
  const databases = found.overDatabases && found.databases >= few ? `, ${span(found.overDatabases)} over databases` : "";
  return `${signed(100 * found.share)} points (95% interval ${span(found.overQuestions)} over questions${databases}), `
    + `p ${pValue(found.p)}, won ${found.won}, lost ${found.lost}`;
}

function conclusion(found, first, second, { level, few_databases: few }) {
  if (!found.won && !found.lost) {
    return `no difference: ${second} and ${first} are right on the same ${found.both} of ${found.questions} questions`;
  }
  if (found.p >= level) return `no difference shown between ${second} and ${first}: ${figures(found, few)}`;
  const text = `${second} is ${found.won > found.lost ? "better" : "worse"} than ${first}: ${figures(found, few)}`;
  if (!found.overDatabases) return `${text}; all questions are about one database, so nothing is shown for others`;
  if (found.databases < few) return `${text}; shown for these ${found.databases} databases, too few to say it of others`;
  if (found.overDatabases[0] <= 0 && found.overDatabases[1] >= 0) {
    return `${text}; shown for these databases, not for others: that interval includes 0`;
  }
  return text;
}
