// Asks a server through node-postgres and prints each answer: the source and its copy have to print the same.
const { Client } = require('pg');
const Cursor = require('pg-cursor');

async function main() {
  process.env.TZ = 'UTC';
  const client = new Client({ connectionString: process.argv[2] });
  await client.connect();
  const print = (name, answer) => console.log(`${name}: ${JSON.stringify(answer)}`);
  const columns = 'id, b, i2, i4, i8, f4, f8, n, t, bs, d, ts, tstz, u, iv, ia, ta';

  print('all', (await client.query(`SELECT ${columns} FROM typed ORDER BY id`)).rows);
  const one = `SELECT ${columns} FROM typed WHERE i8 = $1 AND n = $2 AND t = $3 AND d = $4`;
  const values = ['7000000000', '12.50', 'a "b", c', '2024-02-29'];
  print('parameters', (await client.query(one, values)).rows);
  for (let run = 0; run < 3; run++) {
    print(`named, run ${run}`, (await client.query({ name: 'one', text: one, values })).rows);
  }
  print('fields', (await client.query(`SELECT ${columns} FROM typed WHERE false`)).fields.map((f) => [f.name, f.dataTypeID]));

  const cursor = client.query(new Cursor('SELECT id, t FROM typed ORDER BY id', [], { rowMode: 'array' }));
  for (let rows; (rows = await cursor.read(4)).length > 0;) print('cursor', rows);
  await cursor.close();

  await client.query('BEGIN');
  const failed = await client.query('SELECT nonsense FROM typed').catch((error) => error.code);
  print('an error', failed);
  print('after it', await client.query('SELECT 1').catch((error) => error.code));
  await client.query('ROLLBACK');
  print('an array', (await client.query('SELECT id FROM typed WHERE i4 = ANY($1) ORDER BY id', [[-4, 2]])).rows);
  await client.end();
}

main().catch((error) => { console.log(`FAILED: ${error.message}`); process.exit(1); });
