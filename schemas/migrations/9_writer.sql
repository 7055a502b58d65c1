-- Which process wrote a lake last, and its commit. A file has a lock for that, and no value here.
ALTER TABLE _rhei.pipeline ADD COLUMN writer VARCHAR;
ALTER TABLE _rhei.pipeline ADD COLUMN attempt UBIGINT;
